"""EXIF orientation: reading it without decoding pixels, and rotating pixels upright.

Images, predicted masks and labels are all upright: labels drawn on the stored pixels are rotated with their image.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

# The operation that each EXIF orientation requires. Orientation 1 is upright.
_UPRIGHT: dict[object, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""

_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")


class Geometry(NamedTuple):
    """Stored size and orientation of an image."""

    stored: tuple[int, int]
    """(H, W) of the stored pixels."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 if it is missing or unknown."""

    @property
    def upright(self) -> tuple[int, int]:
        """(H, W) as returned by :func:`reclip_d2.data.images.read_image`."""
        return self.stored[::-1] if self.orientation in SIDEWAYS else self.stored


def turn_upright(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """Rotate stored pixels ``(H, W)`` or ``(H, W, channels)`` upright; contiguous. Unknown orientations change
    nothing."""
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def geometry_of(image: Image.Image) -> Geometry:
    """Geometry of an image that is opened but not loaded. A damaged EXIF block is ignored."""
    size, orientation = image.size[::-1], _orientation(image)
    if image.format == "TIFF" and orientation in SIDEWAYS:
        size = image.tag_v2[257], image.tag_v2[256]  # Image.size would be the upright size
    return Geometry(size, orientation)


def _orientation(image: Image.Image) -> int:
    try:
        if image.format == "PNG" and not _metadata_after_pixels(image.fp):
            exif = Image.Image.getexif(image)  # PngImageFile.getexif decodes all pixels to read what follows them
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # nearly anything; reported when the image is read
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _metadata_after_pixels(stream: BinaryIO) -> bool:
    """Whether a PNG has text or EXIF data after its pixels."""
    position = stream.tell()
    try:
        stream.seek(8)
        pixels = False
        while len(head := stream.read(8)) == 8:
            kind = head[4:]
            pixels |= kind == b"IDAT"
            if pixels and kind in _PNG_METADATA:
                return True
            stream.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
        return False
    finally:
        stream.seek(position)
