"""What a TIFF's tags say about its samples: Pillow ignores some tags, and decodes some kinds wrongly.
Field names are those of the specification (TIFF 6.0).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import BinaryIO

from PIL import Image, TiffImagePlugin

_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _SAMPLES_PER_PIXEL = 258, 259, 262, 277
_MAX_SAMPLE_VALUE, _PLANAR_CONFIGURATION, _EXTRA_SAMPLES = 281, 284, 338
_SAMPLE_FORMAT, _S_MAX_SAMPLE_VALUE = 339, 341
_WHITE_IS_ZERO, _YCBCR = 0, 6
_SIGNED = 2
_PHOTOMETRIC_NAMES = {
    4: "a transparency mask",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "a camera's raw data",
    32844: "LogL",
    32845: "LogLuv",
    34892: "a camera's raw data",
}
_FORMAT_NAMES = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped", 5: "complex", 6: "complex"}


def misread(image: Image.Image) -> str | None:
    """Describe, as :func:`describe_tiff`, a TIFF that Pillow opens but decodes wrongly; None if it decodes correctly.

    Args:
        image: just opened.
    """
    tags = image.tag_v2
    compressed = tags.get(_COMPRESSION, 1) != 1
    if image.mode == "F":
        return "floating-point pixels"
    if image.mode == "L" and _is_signed(image):
        return "signed 8-bit samples"
    if image.mode == "I" and compressed and tags.prefix == b"MM":  # Pillow would swap the bytes
        return f"compressed big-endian samples of {_bits(tags)} bits"
    if not compressed and tags.get(_PHOTOMETRIC) == _YCBCR and image.mode != "L":
        return "uncompressed YCbCr samples"
    if not compressed and tags.get(_PLANAR_CONFIGURATION) == 2 and image.mode != "L" and _bits(tags) > 8:
        return f"uncompressed planes of {_bits(tags)} bits"
    return None


def is_white_zero(image: Image.Image) -> bool:
    """Whether samples of more than 8 bits are inverted; Pillow handles inverted samples of up to 8 bits."""
    return image.tag_v2.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO and _bits(image.tag_v2) > 8


def is_unsigned_32(image: Image.Image) -> bool:
    """Whether Pillow's int32 pixels come from unsigned samples."""
    return _bits(image.tag_v2) == 32 and not _is_signed(image)


def sample_bits(image: Image.Image) -> int:
    """Bits of a sample without its sign."""
    return _bits(image.tag_v2) - _is_signed(image)


def declared_bits(image: Image.Image) -> int | None:
    """Bits that MaxSampleValue or SMaxSampleValue needs; None without such a tag.

    Writers of microscopes and scanners declare 4095 for 12 bits in 16. In the specification the tag is a statistic, and
    some write the image's own maximum, so only its number of bits counts.
    """
    found = []
    for tag in (_MAX_SAMPLE_VALUE, _S_MAX_SAMPLE_VALUE):
        value = image.tag_v2.get(tag, ())
        found += value if isinstance(value, tuple) else (value,)
    values = [value for value in found if isinstance(value, (int, float)) and 0 < value < 1 << 32]
    return int(max(values)).bit_length() if values else None


def has_alpha(image: Image.Image) -> bool:
    """Whether the file declares alpha. Without ExtraSamples a fourth band may be anything, such as infrared."""
    value = image.tag_v2.get(_EXTRA_SAMPLES, ())
    return any(extra in (1, 2) for extra in (value if isinstance(value, tuple) else (value,)))


def describe_tiff(stream: BinaryIO) -> str | None:
    """Describe in words a TIFF that Pillow does not open; None if the tags do not tell, as in a damaged file.

    Args:
        stream: at the beginning of the file.
    """
    try:
        header = stream.read(8)
        if header[2:3] == b"+" or header[3:4] == b"+":
            header += stream.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        stream.seek(tags.next)
        tags.load(stream)
        bands, bits = int(tags.get(_SAMPLES_PER_PIXEL, 1)), _bits(tags)
        formats, photometric = tags.get(_SAMPLE_FORMAT, (1,)), tags.get(_PHOTOMETRIC)
        name = _FORMAT_NAMES.get((formats if isinstance(formats, tuple) else (formats,))[0], "unknown")
    except Exception:  # a damaged file, as in read_image
        return None
    if photometric in _PHOTOMETRIC_NAMES:
        return f"{_PHOTOMETRIC_NAMES[photometric]} (photometric interpretation {photometric})"
    if bands > 4:
        return f"{bands} bands, of which only three (red, green and blue) are supported"
    if photometric == _WHITE_IS_ZERO and bits > 8:
        return f"inverted samples (WhiteIsZero) of {bits} bits"
    return f"{bands} band{'s' * (bands != 1)} of {bits}-bit {name} samples"


@functools.cache
def silence_libtiff() -> None:
    """Keep Pillow's libtiff from writing about damaged files to standard error: Pillow raises an error if it matters.
    Linux only, where the library can be found in the process's memory map."""
    with contextlib.suppress(OSError, AttributeError):
        maps = Path("/proc/self/maps").read_text(errors="replace").split("\n")
        for path in {line[line.index("/") :] for line in maps if "/libtiff" in line}:
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


def _bits(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    value = tags.get(_BITS_PER_SAMPLE, (1,))
    return int(max(value) if isinstance(value, tuple) else value)


def _is_signed(image: Image.Image) -> bool:
    value = image.tag_v2.get(_SAMPLE_FORMAT, (1,))
    return _SIGNED in (value if isinstance(value, tuple) else (value,))
