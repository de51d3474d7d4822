"""The check of the CUDA code on a GPU, run by `tools/gpu_check.sh`; see docs/gpu_check.md."""
