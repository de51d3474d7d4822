"""Reading images.

Shape letters: (H, W) size in pixels of the upright image.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image

from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)

# Pillow refuses images from 179 million pixels on. Scans and aerial images have more: 20,000 x 20,000 is 400 million.
# This limit is ours: an image of it takes 7 GB while it is decoded.
MAX_PIXELS = 1_000_000_000
# Rows that are converted at a time, so that a large image is not held several times.
_STRIP = 256

# What each EXIF orientation asks for. Orientation 1 is upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}


class _PillowLimit:
    """Takes Pillow's own limit away as long as anyone reads; threads may."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0
        self.limit: int | None = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        with self.lock:
            if self.readers == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.readers -= 1
                if self.readers == 0:
                    Image.MAX_IMAGE_PIXELS = self.limit


_pillow_limit = _PillowLimit()


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as 8-bit RGB, upright (EXIF orientation applied).

    Grey, palette and CMYK images are converted, an alpha channel is dropped, 16 bits are scaled to 8. Of a file with
    several pictures (TIFF pages, animations) the first is read. A damaged EXIF block is passed over, with a warning in
    the log.

    Returns:
        ``(H, W, 3)`` uint8, contiguous.

    Raises:
        ReclipError: the file is missing, is no image, is cut short, has more than :data:`MAX_PIXELS`, or holds
            floating-point pixels.
    """
    try:
        with _pillow_limit.lifted(), Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ReclipError(
                    f"image {path} has {width} x {height} pixels, more than {MAX_PIXELS:,}: cut it into pieces"
                )
            if image.mode == "F":
                raise ReclipError(f"image {path} holds floating-point pixels: convert it to 8-bit RGB")
            image.load()  # of a TIFF this applies the orientation, and takes the tag away
            orientation = _orientation(image, path)
            pixels = _rgb(image)
    except (ReclipError, MemoryError):
        raise
    except FileNotFoundError:
        raise ReclipError(f"image {path} does not exist: check the data set's folder") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ReclipError(f"image {path} cannot be read ({cause}): replace or remove the file") from error
    upright = _UPRIGHT.get(orientation)
    return pixels if upright is None else np.ascontiguousarray(upright(pixels))


def _orientation(image: Image.Image, path: str | os.PathLike[str]) -> object:
    """The EXIF orientation of a decoded image, 1 where there is none. Its pixels are sound without it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception as error:  # as of damaged pixels
        _warn_of_exif(os.fspath(path), " ".join(str(error).split()) or type(error).__name__)
        return 1


@functools.cache  # once a file: training reads it many times
def _warn_of_exif(path: str, cause: str) -> None:
    logger.warning("the EXIF block of image %s cannot be read (%s): it is taken as it is stored", path, cause)


def peek_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(H, W) that a file's header promises, before the orientation is applied; (0, 0) for a file that is no image."""
    try:
        with _pillow_limit.lifted(), Image.open(path) as image:
            return image.height, image.width
    except Exception:  # as read_image: a reader that needs the image will say why
        return 0, 0


def peek_pixels(path: str | os.PathLike[str]) -> int:
    """Pixels that a file's header promises; 0 for a file that is no image."""
    height, width = peek_size(path)
    return height * width


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels ``(H, W, 3)`` uint8 of a decoded image, as it is stored."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        strip = image.crop((0, top, width, bottom))
        if strip.mode.startswith("I"):  # Pillow's own conversion would clip at 255
            grey = np.asarray(strip).astype(np.int64).clip(0, 65535) * (255 / 65535)
            pixels[top:bottom] = np.rint(grey).astype(np.uint8)[..., None]
        else:
            pixels[top:bottom] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels
