"""Small shared helpers, independent of images, models and runs."""
