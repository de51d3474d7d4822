"""Reading images.

Shape letters: (H, W) size in pixels of the upright image.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from reclip_d2.data.image_file import open_image
from reclip_d2.data.orientation import Geometry, geometry_of, turn_upright
from reclip_d2.data.samples import Samples, declares_alpha
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import display_path

logger = logging.getLogger(__name__)

# Beyond this ratio of the longer to the shorter side, a resized image has no patch left.
MAX_ASPECT = 100
_CANNOT_HAVE_ALPHA = (".jpg", ".jpeg", ".jpe", ".jfif")


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as 8-bit RGB, upright (EXIF orientation applied).

    Grey, palette, CMYK and L*a*b* images are converted, 16 bits are scaled to 8. Grey samples with fewer significant
    bits in 16 are scaled by what the file declares (MaxSampleValue of a TIFF, sBIT of a PNG). Transparent regions are
    composited onto white, as in viewers: the colours beneath are often leftovers. Of files with several pictures (TIFF
    pages, animations) the first is read. A damaged EXIF block is skipped, with a warning in the log.

    Returns:
        ``(H, W, 3)`` uint8, contiguous.

    Raises:
        ReclipError: the file cannot be opened, see :func:`reclip_d2.data.image_file.open_image`; it is cut short, or
            holds samples whose brightness is unknown, such as floating-point numbers.
    """
    with open_image(path) as image:
        samples = Samples(image, f"image {display_path(path)}")
        image.load()  # for a TIFF this applies the orientation, and removes the tag
        orientation = _orientation(image, path)
        pixels = samples.rgb()
    return turn_upright(pixels, orientation)


def _orientation(image: Image.Image, path: str | os.PathLike[str]) -> object:
    """The EXIF orientation of a decoded image; 1 if there is none, or the EXIF block is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        _warn_of_exif(os.fspath(path), " ".join(str(error).split()) or type(error).__name__)
        return 1


@functools.cache  # once per file: training reads it many times
def _warn_of_exif(path: str, cause: str) -> None:
    logger.warning("the EXIF block of image %s cannot be read (%s): the image is used as stored", path, cause)


def read_geometry(path: str | os.PathLike[str]) -> Geometry:
    """Size and orientation of an image, from its header.

    Raises:
        ReclipError: the file cannot be opened, see :func:`reclip_d2.data.image_file.open_image`.
    """
    with open_image(path) as image:
        return geometry_of(image)


def check_aspect(path: str | os.PathLike[str], size: tuple[int, int]) -> None:
    """Raise :class:`ReclipError` for an image that is too narrow to be resized.

    Args:
        size: (H, W).
    """
    if max(size) > MAX_ASPECT * min(size):
        raise ReclipError(
            f"image {display_path(path)} has {size[1]} x {size[0]} pixels, with one side more than {MAX_ASPECT} times"
            " the other: crop it"
        )


def peek_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(H, W) declared in a file's header, before the orientation is applied; (0, 0) if it is not an image."""
    try:
        with open_image(path) as image:
            return image.height, image.width
    except ReclipError:  # reported when the image is read
        return 0, 0


def peek_pixels(path: str | os.PathLike[str]) -> int:
    """Number of pixels declared in a file's header; 0 if it is not an image."""
    height, width = peek_size(path)
    return height * width


def has_alpha(path: str | os.PathLike[str]) -> bool:
    """Whether a file's header declares transparency; False if it is not an image, and for JPEGs without a look."""
    if Path(path).suffix.lower() in _CANNOT_HAVE_ALPHA:
        return False
    try:
        with open_image(path) as image:
            return declares_alpha(image)
    except ReclipError:  # as peek_size
        return False


_logged: set[str] = set()


def log_alpha(dataset: str, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Log :func:`describe_alpha` of a data set, once per process."""
    if dataset not in _logged:
        _logged.add(dataset)
        if line := describe_alpha(paths):
            logger.info("%s: %s", dataset, line)


def describe_alpha(paths: Iterable[str | os.PathLike[str]]) -> str:
    """One line for the log: how many images declare transparency, and how it is handled; "" if none does."""
    count = sum(map(has_alpha, paths))
    if not count:
        return ""
    return f"{count:,} image{'s have' if count > 1 else ' has'} an alpha channel: transparent regions are read as white"
