"""From a file's samples, of whatever depth and colours, to 8-bit RGB.

Shape letters: (H, W) size in pixels, as the image is stored.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image

from reclip_d2.data import tiff
from reclip_d2.errors import ReclipError

# Rows that are converted at a time, so that a large image is not held several times.
_STRIP = 256
_PNG_SIGNATURE = 8
# Chunks that may come before the significant bits; a file with more is not worth the search.
_MAX_PNG_CHUNKS = 100


def declares_alpha(image: Image.Image) -> bool:
    """Whether an image that was just opened has transparency."""
    if image.format == "TIFF":
        return tiff.has_alpha(image)
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


class Samples:
    """How the samples of an image that was just opened become 8-bit RGB; what cannot is refused before decoding."""

    def __init__(self, image: Image.Image, where: str) -> None:
        self.image, self.where = image, where
        is_tiff = image.format == "TIFF"
        if is_tiff and (kind := tiff.misread(image)):
            raise ReclipError(f"{where} holds {kind}: convert it to 8-bit RGB")
        self.white_is_zero = is_tiff and tiff.is_white_zero(image)
        self.unsigned_32 = is_tiff and tiff.is_unsigned_32(image)
        self.bits = tiff.sample_bits(image) if is_tiff else 16
        declared = tiff.declared_bits(image) if is_tiff else None
        # The chunk is of the samples before they were scaled to 16 bits, which some writers forget.
        if image.format == "PNG" and image.fp is not None:
            declared = _significant_bits(image.fp)
        self.declared_bits = declared if declared is None else max(declared, 8)
        self.has_alpha = declares_alpha(image)
        self.is_deep = _raw_mode(image).partition(";")[2].startswith("16")
        self.key = _transparent_sample(image)

    def rgb(self) -> np.ndarray:
        """Pixels ``(H, W, 3)`` uint8 of the decoded image, as it is stored."""
        width, height = self.image.size
        deep_grey = self.image.mode.startswith("I")
        white = self._white() if deep_grey else 255
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, _STRIP):
            bottom = min(top + _STRIP, height)
            strip = self.image.crop((0, top, width, bottom))
            if deep_grey:
                pixels[top:bottom] = self._grey(strip, white)[..., None]
            elif self.has_alpha:
                pixels[top:bottom] = _on_white(strip)
            else:
                pixels[top:bottom] = np.asarray(_to_rgb(strip))
        if self.is_deep and not deep_grey:
            self._check_brightness(pixels)
        return pixels

    def _deep(self, strip: Image.Image) -> np.ndarray:
        """``(H, W)`` int64 samples of a grey strip of more than 8 bits."""
        samples = np.asarray(strip)
        return (samples.view(np.uint32) if self.unsigned_32 else samples).astype(np.int64)

    def _white(self) -> int:
        """The sample that is white; black is 0."""
        width, height = self.image.size
        tops = range(0, height, _STRIP)
        largest = max(
            int(self._deep(self.image.crop((0, top, width, min(top + _STRIP, height)))).max(initial=0)) for top in tops
        )
        for bits in (self.declared_bits, min(self.bits, 16)):
            if bits is not None and bits <= self.bits and largest < 1 << bits:
                return (1 << bits) - 1
        raise ReclipError(
            f"{self.where} holds samples of {self.bits} bits up to {largest}, and does not declare which is white:"
            " convert it to 8-bit RGB"
        )

    def _grey(self, strip: Image.Image, white: int) -> np.ndarray:
        samples = self._deep(strip)
        grey = np.rint(samples.clip(0, white) * (255 / white)).astype(np.uint8)
        if self.white_is_zero:
            grey = 255 - grey
        if isinstance(self.key, int):
            grey[samples == self.key] = 255
        return grey

    def _check_brightness(self, pixels: np.ndarray) -> None:
        """Refuse colours whose samples are of fewer bits in 16: of them Pillow keeps the upper eight."""
        bits = self.declared_bits
        if bits is not None and bits < 16 and int(pixels.max(initial=0)) < 1 << (bits - 8):
            raise ReclipError(f"{self.where} holds colours of {bits} bits in 16: convert it to 8-bit RGB")


def _raw_mode(image: Image.Image) -> str:
    """How the samples of an image that was just opened lie in the file, such as ``"RGB;16B"``; "" if unknown."""
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _transparent_sample(image: Image.Image) -> object:
    """The sample or colour that a PNG declares transparent, set right in ``image.info`` for Pillow's conversion."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or image.mode == "P":
        return None
    raw = _raw_mode(image)
    if image.mode == "RGB" and raw.endswith(("16B", "16L")):
        del image.info["transparency"]  # only the upper eight of its 16 bits are left in the pixels
    elif image.mode == "L" and raw.endswith((";2", ";4")) and isinstance(key, int):
        bits = int(raw[-1])
        image.info["transparency"] = (key & ((1 << bits) - 1)) * 255 // ((1 << bits) - 1)  # as the samples are scaled
    return key


def _to_rgb(strip: Image.Image) -> Image.Image:
    if strip.mode == "LAB":
        return _lab_to_rgb()(strip)
    return strip if strip.mode == "RGB" else strip.convert("RGB")


@functools.cache
def _lab_to_rgb() -> Callable[[Image.Image], Image.Image]:
    from PIL import ImageCms  # Pillow may have been built without it

    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    return lambda image: ImageCms.applyTransform(image, transform)


def _on_white(strip: Image.Image) -> np.ndarray:
    """``(H, W, 3)`` uint8 of a strip with transparency, over white."""
    rgba = np.asarray(strip.convert("RGBA")).astype(np.uint16)
    colors, alpha = rgba[..., :3], rgba[..., 3:]
    return ((colors * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _significant_bits(stream: BinaryIO) -> int | None:
    """The largest number of significant bits of any channel of a PNG (chunk sBIT); None without the chunk.

    Args:
        stream: the file; its position is kept.
    """
    place = stream.tell()
    try:
        stream.seek(_PNG_SIGNATURE)
        for _ in range(_MAX_PNG_CHUNKS):
            header = stream.read(8)
            if len(header) < 8:
                return None
            length, name = struct.unpack(">I4s", header)
            if name in (b"PLTE", b"IDAT", b"IEND"):  # sBIT comes before
                return None
            if name == b"sBIT":
                bits = stream.read(min(length, 4))
                return max(bits, default=0) or None
            stream.seek(length + 4, 1)
    finally:
        stream.seek(place)
    return None
