#!/bin/bash
# Collects what tools/gpu_check.sh needs on a machine without a network that has Python 3.12, PyTorch, torchvision and the
# usual scientific packages: wheels in output/gpu_check_wheels (ignored by git), with Detectron2 from this environment, and
# the extension built here, which saves building it there.
#
#     tools/gpu_check/collect_wheels.sh
#
# PYTHON names the interpreter of an environment in which reclip_d2 works (.venv/bin/python). Exit status 1 if
# wheels and tracked files together exceed LIMIT_MIB (64).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python} LIMIT_MIB=${LIMIT_MIB:-64} WHEELS=${GPU_CHECK_WHEELS:-output/gpu_check_wheels}
# Packages missing on such a machine, from PyPI, in the versions of this environment.
PACKAGES="open_clip_torch fvcore iopath yacs termcolor ftfy wcwidth omegaconf antlr4-python3-runtime pycocotools"
# Optional: some versions of Detectron2 and of this package need them.
OPTIONAL="hydra-core jsonschema attrs jsonschema-specifications referencing rpds-py"
rm -rf "$WHEELS"
mkdir -p "$WHEELS"
version() { "$PYTHON" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }
platforms=(--platform any)
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
fetch() { # NAME VERSION
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$WHEELS" "$1==$2" 2>/dev/null ||
    "$PYTHON" -m pip wheel -q --no-deps -w "$WHEELS" "$1==$2" # a source package in pure Python
}
for name in $PACKAGES; do
  found=$(version "$name") || { echo "error: this environment has no $name: make env first" >&2; exit 1; }
  fetch "$name" "$found" || { echo "error: no wheel of $name $found for Python 3.12" >&2; exit 1; }
done
for name in $OPTIONAL; do
  if found=$(version "$name"); then fetch "$name" "$found" || echo "no wheel of $name $found for Python 3.12: skipped"; fi
done
others=$(ls "$WHEELS" | grep '[.]whl$' | grep -v -e '-py[23.]*-none-any' -e '-cp312-' -e '-abi3-' || true)
[ -z "$others" ] || { echo "error: built for another Python: $others" >&2; exit 1; }
# The installed Detectron2 (0.5 patched by reclip_d2.install_detectron2): pure Python, packed as a wheel.
"$PYTHON" tools/gpu_check/pack_installed.py detectron2 "$WHEELS"
for built in reclip_d2/_C*.so; do
  if [ -e "$built" ] && newer=$(find csrc -newer "$built" | head -1) && [ -n "$newer" ]; then
    echo "error: $newer is newer than $built: pip install -e . --no-build-isolation first" >&2
    exit 1
  fi
  [ ! -e "$built" ] || strip --strip-unneeded -o "$WHEELS/$(basename "$built")" "$built"
done
bytes=$(($(git ls-files -z | xargs -0 -r stat -c %s 2>/dev/null | paste -sd+ | bc) + $(du -sb "$WHEELS" | cut -f1)))
ls -l "$WHEELS"
echo "wheels and tracked files: $((bytes / 1048576)) MiB of $LIMIT_MIB"
[ "$bytes" -le $((LIMIT_MIB * 1048576)) ] || { echo "error: more than $LIMIT_MIB MiB" >&2; exit 1; }
