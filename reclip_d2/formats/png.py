"""PNG files of label maps.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from reclip_d2.data.index_images import Palette, read_index_image
from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MaskClasses
from reclip_d2.utils.files import MissingFileError
from reclip_d2.utils.io import atomic_write


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write ``(H, W)`` uint8 or uint16 (8 or 16 bits, grey), or ``(H, W, 3)`` uint8 (RGB)."""
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def png_bytes(pixels: np.ndarray) -> bytes:
    """The bytes that :func:`write_png` writes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def read_index(path: Path, classes: MaskClasses) -> np.ndarray:
    """Read an index mask.

    Returns:
        ``(H, W)`` of the classes' dtype.

    Raises:
        ReclipError: the file is missing, damaged, or no index mask of these classes: a palette must be the classes'.
    """
    modes = ("L", "P") if classes.dtype == np.uint8 else ("I;16", "I;16B", "I")
    palette = Palette(dict(enumerate(classes.colors)), own=True, ignore_label=classes.ignore_label)
    try:
        labels = read_index_image(
            path,
            None,
            what="mask",
            remedy="remove it and predict again",
            palette=palette,
            modes=modes,
            wrong_mode="not an index mask: remove it and predict again",
        )
    except MissingFileError:
        raise ReclipError(f"mask {path} is missing: predict again, finished masks are kept") from None
    return classes.checked(labels, str(path))
