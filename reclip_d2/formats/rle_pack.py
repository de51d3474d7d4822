"""The run-length encoding of Label Studio's brush masks: thi.ng's ``rle-pack``.

The data is a stream of bits, highest first: the number of values (32 bits), the bits of a value less 1 (5 bits), four
sizes less 1 (4 bits each), then runs. A run is 1, the index of a size (2 bits), its length less 1 in so many bits, and
the value. (A 0 in place of the 1 announces different values, which masks do not need.) The values are the bytes of an
RGBA picture, row by row: 255 in all four channels inside, 0 outside.

Shape letters: R runs, (H, W) size in pixels.
"""

from __future__ import annotations

import numpy as np

from reclip_d2.errors import ReclipError

VALUE_BITS = 8
LENGTH_BITS = np.array([3, 4, 8, 16])
CHANNELS = 4
INSIDE = 255
_LIMITS = 1 << LENGTH_BITS  # the longest run of each size


def encode_mask(start: np.ndarray, end: np.ndarray, pixels: int) -> bytes:
    """Encode a mask.

    Args:
        start: ``(R,)`` first pixel of each run of the mask, row by row.
        end: ``(R,)`` the pixel after each run; runs neither touch nor overlap.
        pixels: H * W.

    Raises:
        ReclipError: there are 2**30 pixels or more, which the format cannot count.
    """
    if pixels * CHANNELS >= 1 << 32:
        raise ReclipError(f"a mask of {pixels:,} pixels is too large for Label Studio: cut the image into pieces")
    bounds = np.stack([start, end], axis=1).ravel().astype(np.int64)
    lengths = np.diff(bounds, prepend=0, append=pixels) * CHANNELS
    values = np.resize(np.array([0, INSIDE], dtype=np.int64), lengths.size)
    lengths, values = _split(lengths, values)
    size = np.searchsorted(_LIMITS, lengths)
    bits = LENGTH_BITS[size]
    words = ((((4 | size) << bits) | (lengths - 1)) << VALUE_BITS) | values
    header, header_bits = [pixels * CHANNELS, VALUE_BITS - 1, *(LENGTH_BITS - 1)], [32, 5, *(4 for _ in LENGTH_BITS)]
    return _pack(np.concatenate([header, words]), np.concatenate([header_bits, 3 + bits + VALUE_BITS]))


def _split(lengths: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut runs at the longest that can be written; drop empty ones."""
    longest = int(_LIMITS[-1])
    parts = -(-lengths // longest)
    result = np.full(int(parts.sum()), longest, dtype=np.int64)
    last = np.cumsum(parts)[parts > 0] - 1
    result[last] = (lengths - (parts - 1) * longest)[parts > 0]
    return result, np.repeat(values, parts)


def _pack(words: np.ndarray, widths: np.ndarray) -> bytes:
    """Write each word in so many bits, highest first; fill up to a byte with zeros."""
    offsets = np.cumsum(widths) - widths
    stream = np.zeros(int(widths.sum()), dtype=np.uint8)
    for bit in range(int(widths.max())):  # of all words that are so wide at once
        wide = widths > bit
        stream[offsets[wide] + widths[wide] - 1 - bit] = words[wide] >> bit & 1
    return np.packbits(stream).tobytes()
