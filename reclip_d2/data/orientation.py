"""EXIF orientation: how an image's stored pixels lie, without decoding them, and turning pixels upright.

Images, predicted masks and labels are all upright: what is drawn on the stored pixels is turned as its image is.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

# What each EXIF orientation asks for. Orientation 1 is upright.
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
"""Orientations that exchange height and width."""

_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")


class Geometry(NamedTuple):
    """How an image lies."""

    stored: tuple[int, int]
    """(H, W) of the stored pixels."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 where there is none or an unknown one."""

    @property
    def upright(self) -> tuple[int, int]:
        """(H, W) as :func:`reclip_d2.data.images.read_image` gives it."""
        return self.stored[::-1] if self.orientation in SIDEWAYS else self.stored


def turn_upright(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """Stored pixels ``(H, W)`` or ``(H, W, channels)``, upright and contiguous; unknown orientations change nothing."""
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def geometry_of(image: Image.Image) -> Geometry:
    """Geometry of an image that was opened and not yet loaded. A damaged EXIF block counts as none."""
    size, orientation = image.size[::-1], _orientation(image)
    if image.format == "TIFF" and orientation in SIDEWAYS:
        size = image.tag_v2[257], image.tag_v2[256]  # Pillow gives the upright size
    return Geometry(size, orientation)


def _orientation(image: Image.Image) -> int:
    try:
        if image.format == "PNG" and not _metadata_after_pixels(image.fp):
            exif = Image.Image.getexif(image)  # PngImageFile's own decodes all pixels to see what follows them
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # nearly anything; whoever reads the image says so
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
