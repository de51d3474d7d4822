"""Training: trainer, checkpoints, hooks, learning-rate schedule, calibration."""
