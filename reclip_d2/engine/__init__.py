"""Training: the trainer, its loop, hooks and solver, and the program ``train_net.py``."""
