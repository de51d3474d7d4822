"""Run-length encodings of label maps (COCO's and Label Studio's): one pass finds the runs of all classes.

Shape letters: (H, W) size in pixels, R runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from pycocotools import mask as coco_mask

from reclip_d2.errors import ReclipError

# Pixels processed at a time: limits the memory for very large label maps.
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Segment:
    """The pixels of one label in an image.

    Attributes:
        label: the class id, or the ignore label.
        counts: COCO's compressed run-length encoding, column by column.
        area: pixels.
        bbox: (x, y, width, height) in pixels, the smallest box.
    """

    label: int
    counts: str
    area: int
    bbox: tuple[int, int, int, int]


def runs(labels: np.ndarray, *, by_column: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal labels in reading order.

    Args:
        labels: ``(H, W)``.
        by_column: read column by column, as in COCO; otherwise row by row.

        Returns:
            Starts ``(R,)`` int64, ends ``(R,)`` int64 (exclusive) and labels ``(R,)``. Neighbouring runs differ.
    """
    lines = labels.T if by_column else labels
    step = max(1, _BLOCK // lines.shape[1])
    starts, values, last = [], [], None
    for first in range(0, lines.shape[0], step):
        flat = lines[first : first + step].ravel()
        change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        if last is None or flat[0] != last:
            change = np.concatenate([[0], change])
        starts.append(change.astype(np.int64) + first * lines.shape[1])
        values.append(flat[change])
        last = flat[-1]
    start = np.concatenate(starts)
    return start, np.append(start[1:], labels.size), np.concatenate(values)


def runs_by_label(labels: np.ndarray, *, by_column: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each label that occurs, ascending: the label, and the starts and ends of its runs; see :func:`runs`."""
    start, end, value = runs(labels, by_column=by_column)
    order = np.argsort(value, kind="stable")
    present, first = np.unique(value[order], return_index=True)
    for label, part in zip(present.tolist(), np.split(order, first[1:]), strict=True):
        yield label, start[part], end[part]


def uncompressed_counts(start: np.ndarray, end: np.ndarray, total: int) -> np.ndarray:
    """COCO's counts: pixels outside, inside, outside, ... from the first pixel; their sum is ``total``."""
    bounds = np.stack([start, end], axis=1).ravel()
    counts = np.diff(bounds, prepend=0, append=total)
    return counts if counts[-1] else counts[:-1]


def segments(labels: np.ndarray) -> list[Segment]:
    """The segment of each label that occurs in ``labels`` ``(H, W)``, ascending."""
    height, width = labels.shape
    result = []
    for label, start, end in runs_by_label(labels, by_column=True):
        counts = uncompressed_counts(start, end, labels.size)
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        box = tuple(int(value) for value in coco_mask.toBbox(rle))
        result.append(Segment(label, rle["counts"].decode("ascii"), int((end - start).sum()), box))
    return result


# Sizes in Label Studio's encoding, see `encode_mask`.
VALUE_BITS = 8
LENGTH_BITS = np.array([3, 4, 8, 16])
CHANNELS = 4
INSIDE = 255
_LIMITS = 1 << LENGTH_BITS  # the longest run of each size


def encode_mask(start: np.ndarray, end: np.ndarray, pixels: int) -> bytes:
    """Encode a mask in Label Studio's brush format: thi.ng's ``rle-pack``.

    The data is a stream of bits, highest first: the number of values (32 bits), the bits of a value less 1 (5 bits),
    four sizes less 1 (4 bits each), then runs. A run is 1, the index of a size (2 bits), its length less 1 in that many
    bits, and the value. (A 0 in place of the 1 marks distinct values, which masks do not need.) The values are the
    bytes of an RGBA picture, row by row: 255 in all four channels inside, 0 outside.

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
    """Split runs at the maximum length; drop empty ones."""
    longest = int(_LIMITS[-1])
    parts = -(-lengths // longest)
    result = np.full(int(parts.sum()), longest, dtype=np.int64)
    last = np.cumsum(parts)[parts > 0] - 1
    result[last] = (lengths - (parts - 1) * longest)[parts > 0]
    return result, np.repeat(values, parts)


def _pack(words: np.ndarray, widths: np.ndarray) -> bytes:
    """Write each word with the given number of bits, highest first; pad to a byte with zeros."""
    offsets = np.cumsum(widths) - widths
    stream = np.zeros(int(widths.sum()), dtype=np.uint8)
    for bit in range(int(widths.max())):  # one bit of all words of this width at once
        wide = widths > bit
        stream[offsets[wide] + widths[wide] - 1 - bit] = words[wide] >> bit & 1
    return np.packbits(stream).tobytes()
