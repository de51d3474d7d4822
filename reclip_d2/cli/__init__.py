"""The command ``reclip``: own images and class names in, masks and models out."""

import os
import sys

# Read by tqdm when it is imported: in a file, as opposed to a terminal, a progress bar is a line every half minute.
if sys.stderr is not None and not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")
