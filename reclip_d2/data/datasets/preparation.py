"""The engine of ``datasets/prepare_*.py``: labels as shipped to index PNGs, checked, in parallel, resumable.

A label file appears under its name only when it is complete and was read back, so whatever exists is done: a program
that was stopped goes on where it was. Files that exist are checked and counted, and made anew if they are broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from reclip_d2.data.datasets.label_sources import LabelSource, read_upright, upright_size
from reclip_d2.data.datasets.registration import IGNORE_LABEL, README
from reclip_d2.errors import ReclipError
from reclip_d2.io import atomic_write

_CHUNK = 16


@dataclass(frozen=True)
class LabelTask:
    """One label to make."""

    image: Path
    source: LabelSource
    target: Path


@dataclass
class Report:
    """What was done, and what the labels hold."""

    written: int = 0
    kept: int = 0
    turned: int = 0
    """Labels that were turned upright with their image."""
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) pixels by class id."""
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) images by class id that occurs in them."""

    def add(self, other: Report) -> None:
        """Add the counts of other labels."""
        self.written += other.written
        self.kept += other.kept
        self.turned += other.turned
        self.pixels += other.pixels
        self.images += other.images

    def _count(self, labels: np.ndarray) -> None:
        histogram = np.bincount(labels.reshape(-1), minlength=256)
        self.pixels += histogram
        self.images += histogram > 0


def mapping_table(mapping: Mapping[int, int]) -> np.ndarray:
    """Table of ``mapping`` from the data set's ids to classes: int16, -1 for ids that the data set does not have."""
    table = np.full(max(mapping) + 1, -1, dtype=np.int16)
    for label_id, index in mapping.items():
        table[label_id] = index
    return table


def map_labels(ids: np.ndarray, table: np.ndarray, source: object) -> np.ndarray:
    """``(H, W)`` ids to ``(H, W)`` uint8 classes.

    Raises:
        ReclipError: an id that the table does not have, or a binary mask where 255 is no id.
    """
    found = np.unique(ids).tolist()
    for label_id in found:
        if not 0 <= label_id < len(table) or table[label_id] < 0:
            if label_id == IGNORE_LABEL and found in ([0, IGNORE_LABEL], [IGNORE_LABEL]):
                raise ReclipError(
                    f"{source} holds 0 and 255 only: it is a binary mask, not a map of class ids; get the data set's"
                    f" own labels, see {README}"
                )
            known = np.flatnonzero(table >= 0).tolist()
            raise ReclipError(
                f"{source} has id {label_id}; the data set's ids are {_ranges(known)}: get its own labels, see {README}"
            )
    return table[ids].astype(np.uint8)


def _ranges(ids: list[int]) -> str:
    """[0, 1, 2, 7] as "0-2, 7"; of many pieces the first and the last."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    pieces = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(pieces if len(pieces) <= 4 else [*pieces[:2], "...", pieces[-1]])


def _finished_label(task: LabelTask, num_classes: int) -> np.ndarray | None:
    """The label that is there already, if it is sound."""
    if not task.target.is_file():
        return None
    try:
        with Image.open(task.target) as image:
            mode, labels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    if mode != "L" or labels.shape != upright_size(task.image):
        return None
    return labels if ((labels < num_classes) | (labels == IGNORE_LABEL)).all() else None


def write_label(labels: np.ndarray, target: Path) -> None:
    """Write ``(H, W)`` uint8 classes as a PNG of mode L, and read it back before it gets its name."""
    with atomic_write(target) as temporary:
        Image.fromarray(labels).save(temporary, format="PNG")
        with Image.open(temporary) as image:
            if image.mode != "L" or not np.array_equal(np.asarray(image), labels):
                raise ReclipError(f"label {target} does not read back as it was written: check the disk")


def convert_chunk(tasks: list[LabelTask], table: np.ndarray, num_classes: int, overwrite: bool) -> Report:
    """Make some labels, one after the other."""
    report = Report()
    for task in tasks:
        labels = None if overwrite else _finished_label(task, num_classes)
        if labels is None:
            ids, turned = read_upright(task.source, task.image)
            labels = map_labels(ids, table, task.source)
            write_label(labels, task.target)
            report.written += 1
            report.turned += turned
        else:
            report.kept += 1
        report._count(labels)
    return report


def _reports(chunks: list[list[LabelTask]], workers: int, *arguments: object) -> Iterator[Report]:
    """Reports of all chunks, in the order in which they end."""
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield convert_chunk(chunk, *arguments)
        return
    executor = ProcessPoolExecutor(workers)
    try:
        futures = [executor.submit(convert_chunk, chunk, *arguments) for chunk in chunks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise ReclipError("a worker process was killed, perhaps for want of memory: lower --workers") from error
    finally:  # after an error, what is being written is finished, and the rest left
        executor.shutdown(wait=True, cancel_futures=True)


def convert_labels(
    tasks: list[LabelTask],
    mapping: Mapping[int, int],
    num_classes: int,
    *,
    title: str,
    workers: int = 1,
    overwrite: bool = False,
) -> Report:
    """Make all labels, with a progress bar.

    Args:
        mapping: the data set's ids to classes 0 to ``num_classes`` - 1, or 255 (ignored).
        title: of the progress bar.
        workers: processes.
        overwrite: make labels that exist anew.

    Raises:
        ReclipError: a label or an image is not as it should be, no label holds any class, or all are binary masks.
    """
    table, report = mapping_table(mapping), Report()
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    with tqdm(total=len(tasks), desc=title, unit="label") as bar:
        for part in _reports(chunks, workers, table, num_classes, overwrite):
            report.add(part)
            bar.update(part.written + part.kept)
    present = np.flatnonzero(report.pixels).tolist()
    if present == [IGNORE_LABEL]:
        raise ReclipError(
            f"{title}: no label holds any class, all pixels are ignored (are they binary masks of 0 and 255?): get its"
            f" own labels, see {README}, and add --overwrite"
        )
    # One class of id 0, and ignored pixels of id 255, in all labels.
    if mapping.get(0) != IGNORE_LABEL and present == [mapping.get(0), IGNORE_LABEL]:
        raise ReclipError(
            f"{title}: the labels hold 0 and 255 only: they are binary masks, not maps of class ids; get its own"
            f" labels, see {README}, and add --overwrite"
        )
    return report
