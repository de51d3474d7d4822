"""Shared by the programs ``datasets/prepare_*.py``: arguments, checks for missing files, the printed report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.label_orientation import DRAWN_ON
from reclip_d2.data.datasets.label_sources import IndexPNG, LabelSource
from reclip_d2.data.datasets.preparation import LabelTask, Report, convert_labels
from reclip_d2.data.datasets.registration import README, DatasetOnDisk, check_inside, scan_ids
from reclip_d2.data.index_images import PLAIN, Palette
from reclip_d2.errors import ReclipError


def check_pairs(
    dataset: DatasetOnDisk, split: str, source_of: Callable[[str], LabelSource], label_ids: Iterable[str] | None
) -> list[LabelTask]:
    """The tasks of a split, after a check that every image has a label and every label an image.

    Args:
        source_of: returns the label of an image id.
        label_ids: ids of all labels in the split's folder; None if that folder holds other splits too.

    Raises:
        ReclipError: an image or a label is missing, or a label would be written outside the split's folder.
    """
    ids = dataset.image_ids(split)
    tasks = [
        LabelTask(dataset.image_path(split, name), source_of(name), dataset.label_path(split, name)) for name in ids
    ]
    check_inside(dataset.root / dataset.splits[split].labels, (task.target for task in tasks))
    without_label = [task for task in tasks if not task.source.exists()]
    if without_label:
        _raise_missing(without_label[0].image, "label", str(without_label[0].source), len(without_label), len(tasks))
    without_image = [task for task in tasks if not task.image.is_file()]
    if without_image:
        _raise_missing(without_image[0].target.stem, "image", without_image[0].image, len(without_image), len(tasks))
    orphans = sorted(set(label_ids or ()) - set(ids))
    if orphans:
        image = dataset.image_path(split, orphans[0])
        raise ReclipError(f"{len(orphans)} labels have no image, first {image}: get the data set again, see {README}")
    return tasks


def _raise_missing(owner: object, kind: str, missing: object, count: int, total: int) -> None:
    raise ReclipError(
        f"{count} of {total} images: {kind} file missing, first {missing} (of {owner}): get it, see {README}"
    )


def label_folder(folder: Path) -> Path:
    """Return ``folder`` if it exists.

    Raises:
        ReclipError: it does not exist.
    """
    if not folder.is_dir():
        raise ReclipError(f"folder {folder} does not exist: put the data set's labels there, see {README}")
    return folder


def prepare_split(
    dataset: DatasetOnDisk,
    split: str,
    mapping: Mapping[int, int],
    arguments: argparse.Namespace,
    source_of: Callable[[str], LabelSource],
    label_ids: Iterable[str] | None = None,
) -> Report:
    """Make the index PNGs of a split and print a report; arguments as in :func:`check_pairs`.

    Raises:
        ReclipError: see :func:`check_pairs` and :func:`~reclip_d2.data.datasets.preparation.convert_labels`; or the
            split is complete but the last class never occurs, which suggests that all ids are one too small.
    """
    tasks = check_pairs(dataset, split, source_of, label_ids)
    title = f"{dataset.name}_{split}"
    report = convert_labels(
        tasks,
        mapping,
        len(dataset.class_names),
        title=title,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        drawn_on=arguments.labels_drawn_on,
    )
    print(format_report(title, report, dataset, split))
    last = len(dataset.class_names) - 1
    if report.written + report.kept == dataset.splits[split].count and not report.pixels[last]:
        if _only_class_of_zero(report, mapping) is not None:
            raise ReclipError(
                f"{title}: the labels contain only 0 and 255: they are binary masks, not maps of class ids; get its own"
                f" labels, see {README}, and add --overwrite"
            )
        raise ReclipError(
            f"{title}: none of the {report.written + report.kept} labels contains the last class,"
            f" {dataset.class_names[last]}: are the ids one too small? get its own labels, see {README}, and add"
            " --overwrite"
        )
    return report


def _only_class_of_zero(report: Report, mapping: Mapping[int, int]) -> int | None:
    """The class of label id 0, if all labels contain only it and ignored pixels, as binary masks would."""
    only = mapping.get(0, IGNORE_LABEL)
    alone = only != IGNORE_LABEL and IGNORE_LABEL in mapping and report.present == [only, IGNORE_LABEL]
    return only if alone else None


def prepare_folder(
    dataset: DatasetOnDisk,
    split: str,
    mapping: Mapping[int, int],
    arguments: argparse.Namespace,
    folder: Path,
    *,
    suffix: str = ".png",
    image_suffix: str = "",
    palette: Palette = PLAIN,
) -> Report:
    """:func:`prepare_split` for labels in a separate folder, with the names of their images.

    Args:
        folder: the split's labels.
        suffix: end of the labels' names, which replaces ``image_suffix`` at the end of the image's id.
        palette: what the colours of palette labels mean.
    """
    label_folder(folder)
    return prepare_split(
        dataset,
        split,
        mapping,
        arguments,
        lambda name: IndexPNG(folder / f"{name.removesuffix(image_suffix)}{suffix}", palette),
        [name + image_suffix for name in scan_ids(folder, suffix)],
    )


def format_report(title: str, report: Report, dataset: DatasetOnDisk, split: str) -> str:
    """A report as text: counts, and per class its share of the pixels and its images."""
    total, labels = max(int(report.pixels.sum()), 1), report.written + report.kept
    lines = [
        f"{title}: {labels} labels in {dataset.root / dataset.splits[split].labels}: {report.written} written,"
        f" {report.kept} already there, {report.turned} rotated upright with their image"
    ]
    if labels != dataset.splits[split].count:
        lines.append(f"note: the complete split has {dataset.splits[split].count} images")
        if len(report.present) == 2 and IGNORE_LABEL in report.present:
            lines.append(f"note: {dataset.class_names[report.present[0]]} is the only class that occurs")
    if report.orientation:
        lines.append(f"orientation: {report.orientation}")
    if report.empty:
        lines.append(f"note: {report.empty} labels contain no class: all their pixels are ignored")
    lines.append(f"{'id':>5}  {'pixels':>9}  {'images':>7}  class")
    for index, name in [*enumerate(dataset.class_names), (IGNORE_LABEL, "(ignored)")]:
        lines.append(f"{index:>5}  {report.pixels[index] / total:>9.4%}  {report.images[index]:>7}  {name}")
    return "\n".join(lines)


def argument_parser(description: str, splits: Iterable[str]) -> argparse.ArgumentParser:
    """Arguments that all preparation programs take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=list(splits),
        default=["val"],
        help="default: val. Training reads no labels; prepare train only for a linear probe and the like",
    )
    parser.add_argument(
        "--workers", type=_positive, default=min(8, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make labels that exist again")
    parser.add_argument(
        "--labels-drawn-on",
        choices=DRAWN_ON,
        help="what labels of images with an EXIF rotation are drawn on if their size does not tell: the stored"
        " pixels or the upright image (default: as the other labels, else the stored pixels)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value
