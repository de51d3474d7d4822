"""The check of the CUDA code on a GPU: steps of one command, `tools/gpu_check.sh`; see docs/gpu_check.md."""
