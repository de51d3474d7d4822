"""Reading labels as the data sets ship them, and bringing them into line with their image.

Shapes: H, W pixels of an upright image. The policy for EXIF rotation is that of ``reclip_d2.data.images``: images are
upright, and so must labels be. A label that was drawn on the stored pixels (its size tells) is turned with its image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from reclip_d2.errors import ReclipError

_EXIF_ORIENTATION = 0x0112
# Transposition that makes an image of an EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class LabelSource(Protocol):
    """Where one image's label comes from."""

    def read(self) -> np.ndarray:
        """``(H, W)`` ids as the data set ships them, an integer dtype."""

    def exists(self) -> bool:
        """Whether there is anything to read."""


@dataclass(frozen=True)
class IndexPNG:
    """A PNG whose pixels are ids: mode L, or P, whose colours are for the eye only."""

    path: Path

    def __str__(self) -> str:
        return f"label {self.path}"

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def read(self) -> np.ndarray:
        """``(H, W)`` uint8.

        Raises:
            ReclipError: the file cannot be read, or has colours or another depth.
        """
        try:
            with Image.open(self.path) as image:
                if image.mode not in ("L", "P"):
                    raise ReclipError(
                        f"{self} is a {image.mode} image, not an 8-bit PNG of class ids: get the data set's own labels"
                    )
                return np.asarray(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ReclipError(f"{self} cannot be read ({error}): get the file again") from error


@dataclass(frozen=True)
class RunLengthLabel:
    """Run-length masks of COCO's format, painted in their order; pixels of none are 0."""

    name: str
    """How errors name it."""
    size: tuple[int, int]
    """(H, W)."""
    masks: tuple[tuple[int, Any], ...]
    """(category id, {"size": [H, W], "counts": ...}) each."""

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """Always: the masks are in memory."""
        return True

    def read(self) -> np.ndarray:
        """``(H, W)`` int64; where masks overlap the last one holds.

        Raises:
            ReclipError: a mask is not of the image's size or cannot be decoded.
        """
        label = np.zeros(self.size, dtype=np.int64)
        for category, segmentation in self.masks:
            label[self._decode(segmentation)] = category
        return label

    def _decode(self, segmentation: Any) -> np.ndarray:
        try:
            if tuple(segmentation["size"]) != self.size:
                raise ReclipError(f"{self} has a mask of size {segmentation['size']}, not {list(self.size)}")
            if isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, *self.size)
            return coco_mask.decode(segmentation).astype(bool)
        except (KeyError, TypeError, ValueError) as error:
            raise ReclipError(
                f"{self} has a mask that is no run-length code ({error!r}): get the file again"
            ) from error


def _image_geometry(path: Path) -> tuple[tuple[int, int], int]:
    """((H, W) as stored, EXIF orientation) of an image."""
    try:
        with Image.open(path) as image:
            # Cityscapes' PNGs would be decoded whole only to learn that they have no EXIF data behind their pixels.
            without = image.format == "PNG" and "exif" not in image.info
            orientation = 1 if without else image.getexif().get(_EXIF_ORIENTATION, 1)
            return image.size[::-1], orientation
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ReclipError(f"image {path} cannot be read ({error}): get the file again") from error


def upright_size(image: Path) -> tuple[int, int]:
    """(H, W) of an image as ``reclip_d2.data.images.read_image`` gives it."""
    (height, width), orientation = _image_geometry(image)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def read_upright(source: LabelSource, image: Path) -> tuple[np.ndarray, bool]:
    """Read a label and turn it upright if it lies on its side as its image's stored pixels do.

    Returns:
        ``(H, W)`` ids, and whether it was turned.

    Raises:
        ReclipError: label or image cannot be read, or their sizes differ.
    """
    label = source.read()
    stored, orientation = _image_geometry(image)
    upright = stored[::-1] if orientation in _SIDEWAYS else stored
    if label.shape == upright:
        return label, False
    if label.shape == stored:
        return np.asarray(Image.fromarray(label.astype(np.int32)).transpose(_UPRIGHT[orientation])), True
    raise ReclipError(
        f"{source} has size {label.shape[1]}x{label.shape[0]}, its image {image} {upright[1]}x{upright[0]}:"
        " they must be the same"
    )
