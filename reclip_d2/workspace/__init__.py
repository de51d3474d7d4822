"""Runs on a user's images: stages, files, models and masks."""
