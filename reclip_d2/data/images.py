"""Reading images."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from reclip_d2.errors import ReclipError


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as 8-bit RGB, upright (EXIF orientation applied).

    Grey, palette and CMYK images are converted, an alpha channel is dropped, 16-bit grey is scaled to 8 bits.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        ReclipError: the file is missing, is no image, is cut short, or holds floating-point pixels.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
                grey = np.asarray(image).astype(np.uint32) * 255 / 65535
                image = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
            elif image.mode == "F":
                raise ReclipError(f"image {path} holds floating-point pixels: convert it to 8-bit RGB")
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise ReclipError(f"image {path} does not exist: check the data set's folder") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ReclipError(f"image {path} cannot be read ({error}): replace or remove the file") from error
