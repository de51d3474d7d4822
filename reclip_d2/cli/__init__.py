"""The command ``reclip``: from images and class names to masks and models."""

import os
import sys

# For downloads by other libraries. tqdm reads this when it is imported: if the output is not a terminal, print progress
# every half minute.
if sys.stderr is not None and not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")
