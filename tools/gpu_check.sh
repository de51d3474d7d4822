#!/bin/bash
# Checks the CUDA code on a GPU and times it, in at most 8 minutes and without a network: docs/gpu_check.md.
#     tools/gpu_check.sh                 # on a GPU; repeat it to resume
#     tools/gpu_check.sh --device cpu    # a dry run with small steps
# PYTHON names the interpreter (python3). If it lacks packages, those collected by tools/gpu_check/collect_wheels.sh are
# used. If OUT names a folder, JSON, Markdown and logs are copied there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHON=${PYTHON:-python3} GPU_CHECK_WHEELS=${GPU_CHECK_WHEELS:-output/gpu_check_wheels}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c 'import detectron2, open_clip' 2>/dev/null; then
  compgen -G "$GPU_CHECK_WHEELS/*.whl" >/dev/null || {
    echo "error: $PYTHON has no detectron2 or open_clip, and $GPU_CHECK_WHEELS no wheels: tools/gpu_check/collect_wheels.sh" >&2
    exit 2
  }
  site=$(mktemp -d) || exit 2
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$GPU_CHECK_WHEELS"/*.whl || exit 2
  export PYTHONPATH=$PYTHONPATH:$site
fi
"$PYTHON" -m tools.gpu_check "$@"
status=$?
[ -z "${site:-}" ] || rm -rf "$site"
exit $status
