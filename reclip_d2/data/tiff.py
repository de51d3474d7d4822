"""What a TIFF's tags say about its samples: Pillow ignores some tags, and decodes some kinds wrongly.
Field names are those of the specification (TIFF 6.0).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, TiffImagePlugin

from reclip_d2.utils.files import open_regular

_SUBFILE_TYPE, _WIDTH, _HEIGHT = 254, 256, 257
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _SAMPLES_PER_PIXEL = 258, 259, 262, 277
_MAX_SAMPLE_VALUE, _PLANAR_CONFIGURATION, _EXTRA_SAMPLES = 281, 284, 338
_SAMPLE_FORMAT, _S_MAX_SAMPLE_VALUE = 339, 341
_WHITE_IS_ZERO, _YCBCR = 0, 6
# ModelPixelScale, ModelTiepoint, ModelTransformation and GeoKeyDirectory of the GeoTIFF standard.
GEO_TAGS = (33550, 33922, 34264, 34735)
_MAX_PAGES = 100_000
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


def page_numbers(path: Path) -> list[int]:
    """Numbers of a TIFF's pages, from 1, without those that are a reduced version or a mask of another, or have another
    size than the first. Empty for a file that is not a TIFF or is damaged, and for a GeoTIFF.

    Reads the directories of tags alone.
    """
    try:
        with open_regular(path, "image") as stream:
            header = stream.read(8)
            if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return []
            if b"+" in header[2:4]:
                header += stream.read(8)
            pages: list[int] = []
            seen: set[int] = set()
            size = None
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            place = tags.next
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about damaged tags
                while place and place not in seen and len(seen) < _MAX_PAGES:
                    seen.add(place)
                    stream.seek(place)
                    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
                    tags.load(stream)
                    if not pages and any(tag in tags for tag in GEO_TAGS):
                        return []
                    shape = tags.get(_WIDTH), tags.get(_HEIGHT)
                    if size is None:
                        size = shape
                    if shape == size and not int(tags.get(_SUBFILE_TYPE, 0)) & 0b101:
                        pages.append(len(seen))
                    place = tags.next
            return pages
    except Exception:  # a damaged file, as in read_image
        return []


def misread(image: Image.Image) -> str | None:
    """Describe, as :func:`describe_tiff`, a TIFF that Pillow opens but decodes wrongly; None if it decodes correctly.

    Args:
        image: just opened.
    """
    tags = image.tag_v2
    compressed = tags.get(_COMPRESSION, 1) != 1
    if image.mode == "F" and compressed and tags.prefix == b"MM":  # as below
        return "compressed big-endian floating-point samples"
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
