#!/bin/bash
# Builds the extension in place, with all cores; falls back to a prebuilt one. Then checks that its operators exist.
# GPU_CHECK_BUILD=no: only the check.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python3}
if [ "${GPU_CHECK_BUILD:-yes}" != no ]; then
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  if ! FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$PYTHON" setup.py build_ext --inplace; then
    # Works with any Python (stable ABI), but only with the same version of PyTorch.
    brought=$(ls "${GPU_CHECK_WHEELS:-output/gpu_check_wheels}"/_C*.so 2>/dev/null | head -1)
    [ -n "$brought" ] || { echo "the build failed, and there is no prebuilt extension"; exit 1; }
    echo "the build failed: using $brought"
    cp "$brought" "reclip_d2/_C$suffix" || exit 1
  fi
fi
"$PYTHON" - <<'PYTHON_END'
import os
import sys

import torch

from reclip_d2.layers import kernels_available

device = "cuda" if os.environ.get("GPU_CHECK_BUILD") != "no" else "cpu"
if not kernels_available(device):
    sys.exit(f"the extension has no operators for {device}")
print(f"operators for {device} with torch {torch.__version__}")
PYTHON_END
