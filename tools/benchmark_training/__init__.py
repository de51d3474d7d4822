"""The training benchmark: see ``__main__``."""
