"""Small helpers that all parts share; they know nothing of images, models or runs."""
