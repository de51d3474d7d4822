#!/bin/bash
# Provides the extension with operators for CUDA: by default the one that tools/gpu_check/collect_wheels.sh has brought,
# which saves a minute; if there is none, or it does not load here, a new one.
# GPU_CHECK_BUILD=yes: a new one in any case. GPU_CHECK_BUILD=no: the one that is in place, for a dry run on the CPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python3} MODE=${GPU_CHECK_BUILD:-brought}

operators_for() { # DEVICE
  "$PYTHON" - "$1" <<'PYTHON_END'
import sys

import torch

from reclip_d2.layers import kernels_available

if not kernels_available(sys.argv[1]):
    sys.exit(f"the extension has no operators for {sys.argv[1]}")
print(f"operators for {sys.argv[1]} with torch {torch.__version__}")
PYTHON_END
}

if [ "$MODE" = no ]; then
  operators_for cpu
  exit
fi
if [ "$MODE" = brought ]; then
  # It works with any Python (stable ABI), but only with the same version of PyTorch.
  brought=$(ls "${GPU_CHECK_WHEELS:-output/gpu_check_wheels}"/_C*.so 2>/dev/null | head -1)
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  if [ -n "$brought" ] && cp "$brought" "reclip_d2/_C$suffix" && operators_for cuda; then exit; fi
  echo "no extension was brought that works here: building one"
fi
FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$PYTHON" setup.py build_ext --inplace && operators_for cuda
