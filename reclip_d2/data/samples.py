"""Converting samples of any depth and colour space to 8-bit RGB.

Shape letters: (H, W) size in pixels of the image as stored.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image

from reclip_d2.data import tiff
from reclip_d2.data.stretch import Limits, limits_of
from reclip_d2.errors import ReclipError

# Rows converted at a time, so that memory does not hold several copies of a large image.
_STRIP = 256
# Samples of a measurement that its percentiles are taken of, about.
_SAMPLED = 4_000_000
_PNG_SIGNATURE = 8
# PNG chunks that are searched for the significant bits.
_MAX_PNG_CHUNKS = 100


def declares_alpha(image: Image.Image) -> bool:
    """Whether a just opened image has transparency."""
    if image.format == "TIFF":
        return tiff.has_alpha(image)
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


class Samples:
    """Converts the samples of a just opened image to 8-bit RGB; unsupported ones are rejected before decoding."""

    def __init__(self, image: Image.Image, where: str) -> None:
        self.image, self.where = image, where
        is_tiff = image.format == "TIFF"
        if is_tiff and (kind := tiff.misread(image)):
            raise ReclipError(f"{where} holds {kind}: convert it to 8-bit RGB")
        self.white_is_zero = is_tiff and tiff.is_white_zero(image)
        self.unsigned_32 = is_tiff and tiff.is_unsigned_32(image)
        self.bits = tiff.sample_bits(image) if is_tiff else 16
        declared = tiff.declared_bits(image) if is_tiff else None
        # The chunk describes the samples before they were scaled to 16 bits; some writers forget to scale.
        if image.format == "PNG" and image.fp is not None:
            declared = _significant_bits(image.fp)
        # A TIFF's deep grey samples are measurements unless the file says which value is white.
        self.is_measured = is_tiff and image.mode[:1] in "IF" and declared is None and self.bits >= 15
        self.declared_bits = declared if declared is None else max(declared, 8)
        self.has_alpha = declares_alpha(image)
        self.is_deep = _raw_mode(image).partition(";")[2].startswith("16")
        self.key = _transparent_sample(image)

    def rgb(self) -> np.ndarray:
        """Pixels ``(H, W, 3)`` uint8 of the decoded image, as stored."""
        width, height = self.image.size
        deep_grey = self.image.mode[:1] in "IF"
        limits = self._limits() if deep_grey else Limits(0, 255)
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, _STRIP):
            bottom = min(top + _STRIP, height)
            strip = self.image.crop((0, top, width, bottom))
            if deep_grey:
                pixels[top:bottom] = self._grey(strip, limits)[..., None]
            elif self.has_alpha:
                pixels[top:bottom] = _on_white(strip)
            else:
                pixels[top:bottom] = np.asarray(_to_rgb(strip))
        if self.is_deep and not deep_grey:
            self._check_brightness(pixels)
        return pixels

    def _deep(self, strip: Image.Image) -> np.ndarray:
        """``(H, W)`` int64 or float32 samples of a grey strip with more than 8 bits."""
        samples = np.asarray(strip)
        if samples.dtype.kind == "f":
            return samples
        return (samples.view(np.uint32) if self.unsigned_32 else samples).astype(np.int64)

    def _limits(self) -> Limits:
        """The values of black and white."""
        if not self.is_measured:
            return Limits(0, self._white())
        width, height = self.image.size
        step = max(1, math.isqrt(width * height // _SAMPLED))
        rows = [self._deep(self.image.crop((0, y, width, y + 1)))[:, ::step] for y in range(0, height, step)]
        sample = np.concatenate(rows)
        return limits_of(sample, np.dtype(np.float32 if sample.dtype.kind == "f" else np.uint16))

    def _white(self) -> int:
        """The value of white; black is 0."""
        width, height = self.image.size
        tops = range(0, height, _STRIP)
        largest = max(
            int(self._deep(self.image.crop((0, top, width, min(top + _STRIP, height)))).max(initial=0)) for top in tops
        )
        for bits in (self.declared_bits, min(self.bits, 16)):
            if bits is not None and bits <= self.bits and largest < 1 << bits:
                return (1 << bits) - 1
        raise ReclipError(
            f"{self.where} has samples of {self.bits} bits up to {largest}, but does not declare which value is white:"
            " convert it to 8-bit RGB"
        )

    def _grey(self, strip: Image.Image, limits: Limits) -> np.ndarray:
        samples = self._deep(strip)
        grey = limits.to_8bit(samples)
        if self.white_is_zero:
            grey = 255 - grey
        if isinstance(self.key, int):
            grey[samples == self.key] = 255
        return grey

    def _check_brightness(self, pixels: np.ndarray) -> None:
        """Reject colours with fewer than 16 significant bits in 16: Pillow keeps only the upper eight."""
        bits = self.declared_bits
        if bits is not None and bits < 16 and int(pixels.max(initial=0)) < 1 << (bits - 8):
            raise ReclipError(f"{self.where} has colours of {bits} bits in 16: convert it to 8-bit RGB")


def _raw_mode(image: Image.Image) -> str:
    """Pillow's raw mode of a just opened image, such as ``"RGB;16B"``; "" if unknown."""
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _transparent_sample(image: Image.Image) -> object:
    """The sample or colour that a PNG declares transparent; corrects ``image.info`` for Pillow's conversion."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or image.mode == "P":
        return None
    raw = _raw_mode(image)
    if image.mode == "RGB" and raw.endswith(("16B", "16L")):
        del image.info["transparency"]  # the pixels keep only the upper eight of its 16 bits
    elif image.mode == "L" and raw.endswith((";2", ";4")) and isinstance(key, int):
        bits = int(raw[-1])
        image.info["transparency"] = (key & ((1 << bits) - 1)) * 255 // ((1 << bits) - 1)  # scaled like the samples
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
    """``(H, W, 3)`` uint8: a strip with transparency, composited onto white."""
    rgba = np.asarray(strip.convert("RGBA")).astype(np.uint16)
    colors, alpha = rgba[..., :3], rgba[..., 3:]
    return ((colors * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _significant_bits(stream: BinaryIO) -> int | None:
    """The largest number of significant bits of any channel of a PNG (chunk sBIT); None without the chunk.

    Args:
        stream: the file; its position is restored.
    """
    place = stream.tell()
    try:
        stream.seek(_PNG_SIGNATURE)
        for _ in range(_MAX_PNG_CHUNKS):
            header = stream.read(8)
            if len(header) < 8:
                return None
            length, name = struct.unpack(">I4s", header)
            if name in (b"PLTE", b"IDAT", b"IEND"):  # sBIT precedes these
                return None
            if name == b"sBIT":
                bits = stream.read(min(length, 4))
                return max(bits, default=0) or None
            stream.seek(length + 4, 1)
    finally:
        stream.seek(place)
    return None
