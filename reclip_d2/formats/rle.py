"""Run-length encoding of label maps: one pass finds the runs of all classes.

Shape letters: (H, W) size in pixels, R runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from pycocotools import mask as coco_mask

# Pixels that are looked at together: bounds the copies of a very large label map.
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
        by_column: read column by column, as COCO does; otherwise row by row.

    Returns:
        starts ``(R,)`` int64, ends ``(R,)`` int64 (exclusive) and labels ``(R,)``. Neighbouring runs differ.
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
    """COCO's counts: pixels outside, inside, outside, ... from the first pixel on; they add up to ``total``."""
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
