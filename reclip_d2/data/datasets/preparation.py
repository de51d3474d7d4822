"""The engine of ``datasets/prepare_*.py``: converts shipped labels to index PNGs, checked, in parallel, resumable.

A label file gets its name only once it is complete and verified, so interrupted programs resume where they stopped.
Existing files are checked and counted, and rewritten if they are broken. Where an image's orientation or a palette is
ambiguous, they are also rewritten if they differ from today's conversion.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.label_orientation import OrientationCounts, count_orientations, read_upright
from reclip_d2.data.datasets.label_sources import LabelSource
from reclip_d2.data.datasets.registration import README
from reclip_d2.data.images import read_geometry
from reclip_d2.data.index_images import read_index_image
from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.progress import count_steps

_CHUNK = 16
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LabelTask:
    """One label to make."""

    image: Path
    source: LabelSource
    target: Path


@dataclass
class Report:
    """What was done, and the contents of the labels."""

    written: int = 0
    kept: int = 0
    turned: int = 0
    """Labels that were rotated upright with their image."""
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) number of pixels per class id."""
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) number of images that contain each class id."""
    empty: int = 0
    """Labels without any class: all pixels are ignored."""
    orientation: str = ""
    """Summary of the images with an EXIF orientation; "" if there are none."""

    def add(self, other: Report) -> None:
        """Add the counts of ``other``."""
        self.written += other.written
        self.kept += other.kept
        self.turned += other.turned
        self.pixels += other.pixels
        self.images += other.images
        self.empty += other.empty

    @property
    def present(self) -> list[int]:
        """Class ids that occur, ascending."""
        return np.flatnonzero(self.pixels).tolist()

    def _count(self, labels: np.ndarray) -> None:
        histogram = np.bincount(labels.reshape(-1), minlength=256)
        self.pixels += histogram
        self.images += histogram > 0
        self.empty += int(histogram[IGNORE_LABEL] == labels.size)


def mapping_table(mapping: Mapping[int, int]) -> np.ndarray:
    """Table of ``mapping`` from the data set's ids to classes: int16, -1 for ids that the data set does not have."""
    table = np.full(max(mapping) + 1, -1, dtype=np.int16)
    for label_id, index in mapping.items():
        table[label_id] = index
    return table


def map_labels(ids: np.ndarray, table: np.ndarray, source: LabelSource) -> np.ndarray:
    """``(H, W)`` ids to ``(H, W)`` uint8 classes.

    Raises:
        ReclipError: an id is not in the table, or the label is a binary mask: grey, with 0 and 255 only, neither a
            class.
    """
    found = np.unique(ids).tolist()
    both_ignored = len(table) > IGNORE_LABEL and table[0] == table[IGNORE_LABEL] == IGNORE_LABEL
    # With VOC's palette it may be an image whose only object is too difficult to label.
    if found == [0, IGNORE_LABEL] and both_ignored and not source.has_palette():
        raise ReclipError(
            f"{source} contains only 0 and 255, neither of which is a class: it is a binary mask, not a map of class"
            f" ids; get the data set's own labels, see {README}"
        )
    for label_id in found:
        if not 0 <= label_id < len(table) or table[label_id] < 0:
            if label_id == IGNORE_LABEL and found in ([0, IGNORE_LABEL], [IGNORE_LABEL]):
                raise ReclipError(
                    f"{source} contains only 0 and 255: it is a binary mask, not a map of class ids; get the data set's"
                    f" own labels, see {README}"
                )
            known = np.flatnonzero(table >= 0).tolist()
            raise ReclipError(
                f"{source} has id {label_id}; the data set's ids are {_ranges(known)}: get its own labels, see {README}"
            )
    return table[ids].astype(np.uint8)


def _ranges(ids: list[int]) -> str:
    """[0, 1, 2, 7] as "0-2, 7"; of many ranges the first two and the last."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    pieces = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(pieces if len(pieces) <= 4 else [*pieces[:2], "...", pieces[-1]])


def _finished_label(task: LabelTask, size: tuple[int, int], num_classes: int) -> np.ndarray | None:
    """The existing label ``(H, W)``, if it is intact and of the image's size."""
    try:
        labels = read_index_image(task.target, size, "its image", modes=("L",))
    except ReclipError:
        return None
    return labels if ((labels < num_classes) | (labels == IGNORE_LABEL)).all() else None


def write_label(labels: np.ndarray, target: Path) -> None:
    """Write ``(H, W)`` uint8 classes as a PNG of mode L, and verify it before it gets its name."""
    with atomic_write(target) as temporary:
        Image.fromarray(labels).save(temporary, format="PNG")
        with Image.open(temporary, formats=("PNG",)) as image:
            if image.mode != "L" or not np.array_equal(np.asarray(image), labels):
                raise ReclipError(f"label {target} does not read back as it was written: check the disk")


def convert_chunk(
    tasks: list[LabelTask], table: np.ndarray, num_classes: int, overwrite: bool, drawn_on: str
) -> Report:
    """Make some labels sequentially; ``drawn_on`` as in :func:`read_upright`."""
    report = Report()
    for task in tasks:
        geometry = read_geometry(task.image)
        labels = finished = None if overwrite else _finished_label(task, geometry.upright, num_classes)
        if finished is None or geometry.orientation != 1 or task.source.is_reordered():
            ids, turned = read_upright(task.source, task.image, geometry, drawn_on)
            labels = map_labels(ids, table, task.source)
            report.turned += turned
        if finished is None or labels is not finished and not np.array_equal(labels, finished):
            write_label(labels, task.target)
            report.written += 1
        else:
            report.kept += 1
        report._count(labels)
    return report


def _scan_chunk(tasks: list[LabelTask]) -> OrientationCounts:
    return count_orientations((task.source, task.image) for task in tasks)


def _in_processes(
    work: Callable[..., _Result], chunks: list[list[LabelTask]], workers: int, *arguments: object
) -> Iterator[_Result]:
    """Results of ``work`` for all chunks, in order of completion."""
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield work(chunk, *arguments)
        return
    # Ctrl-C in a terminal reaches all processes; the main one ends the others, which would each print a traceback.
    executor = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        futures = [executor.submit(work, chunk, *arguments) for chunk in chunks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise ReclipError("a worker process was killed, perhaps out of memory: lower --workers") from error
    finally:  # after an error, labels that are being written are finished, the others cancelled
        executor.shutdown(wait=True, cancel_futures=True)


def convert_labels(
    tasks: list[LabelTask],
    mapping: Mapping[int, int],
    num_classes: int,
    *,
    title: str,
    workers: int = 1,
    overwrite: bool = False,
    drawn_on: str | None = None,
) -> Report:
    """Make all labels, with a progress bar.

    Args:
        mapping: the data set's ids to classes 0 to ``num_classes`` - 1, or 255 (ignored).
        title: of the progress bar.
        workers: processes.
        overwrite: make labels that exist again.
        drawn_on: what labels of images with an EXIF orientation are drawn on, ``stored`` or ``upright``, if their size
            does not tell. None: as the other labels, or else the stored pixels, which the programs show that these data
            sets were labelled with.

    Raises:
        ReclipError: a label or an image is invalid, or no label contains any class.
    """
    table, report = mapping_table(mapping), Report()
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    counts = OrientationCounts()
    for part in _in_processes(_scan_chunk, chunks, workers):
        counts.add(part)
    drawn_on = counts.drawn_on(title, "stored", drawn_on, "add --labels-drawn-on stored or upright")
    with count_steps(title, len(tasks), unit="label") as steps:
        for part in _in_processes(convert_chunk, chunks, workers, table, num_classes, overwrite, drawn_on):
            report.add(part)
            steps.advance(part.written + part.kept)
    if counts.total:
        report.orientation = counts.describe(drawn_on)
    if report.present == [IGNORE_LABEL]:
        raise ReclipError(
            f"{title}: no label contains any class, all pixels are ignored (are they binary masks of 0 and 255?): get"
            f" its own labels, see {README}, and add --overwrite"
        )
    return report
