"""A run on somebody's folder of images: its stages, its files, and the model and masks that come of it."""
