"""Data: label-blind mapping, resumable sampling, the embedded data set."""
