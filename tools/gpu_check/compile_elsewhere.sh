#!/bin/bash
# Compiles the extension for CUDA in a temporary copy of the sources, so that the one in use is not disturbed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE csrc reclip_d2 configs "$copy/"
rm -f "$copy"/reclip_d2/_C*.so
cd "$copy"
FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$PYTHON" setup.py build_ext --inplace
ls -l reclip_d2/_C*.so
