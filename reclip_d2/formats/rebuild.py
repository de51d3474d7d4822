"""Check the requested formats before a run, and write them from its index masks afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.pictures import read_index
from reclip_d2.formats.prediction import Prediction, check_paths
from reclip_d2.formats.registry import FORMATS
from reclip_d2.formats.writer import Writer
from reclip_d2.utils.io import remove_leftovers


def check_formats(names: Iterable[str], classes: MaskClasses) -> None:
    """Raise :class:`ReclipError` for an unknown format, or one that cannot hold these classes.

    Call it at the start of a run, not after hours of prediction.
    """
    for name in names:
        if name not in FORMATS:
            raise ReclipError(f"format {name!r} is unknown: choose from {', '.join(FORMATS)}")
        FORMATS[name].check_classes(classes)


def check_names(formats: Iterable[str], paths: Iterable[PurePosixPath]) -> None:
    """Raise :class:`ReclipError` if the name of an image cannot be written, in one of these formats or in any.

    Call it at the start of a run, like :func:`check_formats`.

    Args:
        paths: relative paths of all images; see :func:`check_paths`.
    """
    paths = list(paths)
    check_paths(paths)
    for name in formats:
        for path in paths:
            FORMATS[name].check_path(path)


def write_formats(
    index_folder: Path,
    images: Mapping[PurePosixPath, Path | None],
    output: Path,
    formats: Iterable[str],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    read_image: Callable[[Path], np.ndarray] = read_image,
    progress: Callable[[int, int], None] | None = None,
    tidy: bool = True,
) -> dict[str, Path]:
    """Write formats from finished index masks, each into the folder ``output/<format>``.

    Formats with one file per image are written only if the file is missing or older than the index mask; those with one
    file for all images are always rewritten. A run that resumes a killed one thus writes the same bytes as an
    uninterrupted run. Files of images that are no longer listed are kept. Only one process may write at a time, except
    formats with :meth:`Writer.is_per_image`.

    Args:
        index_folder: index masks and their ``classes.json``.
        images: relative path, with extension, and file of each image; None if the file is not available: then
            ``overlay`` is impossible, and ``yolo`` and ``fiftyone`` link no image.
        output: folder of the formats' folders.
        formats: names in :data:`FORMATS`. ``index`` is the input and is skipped; ``scores`` must exist already.
        options: keyword arguments of the writer of each format.
        overwrite: rewrite every file.
        read_image: RGB ``(H, W, 3)`` uint8, upright, of a file.
        progress: called with (images done, total images) after each image.
        tidy: remove the half-written files of killed runs; not while other processes write there.

        Returns:
            The folder of each format.

    Raises:
        ReclipError: an index mask is missing or damaged, a format is unknown or cannot represent the name of a class or
            an image, two images have the same stem, scores are missing, or an image's size is not its mask's.
    """
    classes = MaskClasses.read(index_folder)
    names = list(dict.fromkeys(formats))
    check_formats(names, classes)
    check_names(names, images)
    made = [name for name in names if name != "index"]
    with contextlib.ExitStack() as stack:
        writers = {}
        for folder in (index_folder, *(output / name for name in made)) if tidy else ():
            remove_leftovers(folder)
        for name in made:
            writer = FORMATS[name](output / name, classes, **(options or {}).get(name, {}))
            writers[name] = stack.enter_context(writer)
        for number, path in enumerate(sorted(images, key=str), start=1):
            file = index_folder / path.with_suffix(".png")
            since = _modified(file)
            todo = _to_write(writers.values(), path, None if overwrite else since)
            if todo:
                labels = read_index(file, classes)
                prediction = _prediction(path, labels, images[path], todo, read_image)
                for writer in todo:
                    writer.add(prediction)
            if progress is not None:
                progress(number, len(images))
        for writer in writers.values():
            writer.finish()
    folders = {name: output / name for name in made}
    return {"index": index_folder, **folders} if "index" in names else folders


def _modified(file: Path) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except FileNotFoundError:
        raise ReclipError(f"mask {file} is missing: predict again, finished masks are kept") from None


def _to_write(writers: Iterable[Writer], path: PurePosixPath, since: int | None) -> list[Writer]:
    """The writers with work to do for an image; all except those of scores if ``since`` is None."""
    todo = []
    for writer in writers:
        if writer.needs_scores:
            if not writer.is_done(path):
                raise ReclipError(f"{writer.files(path)[0]} is missing, and masks contain no scores: predict again")
        elif since is None or not writer.is_done(path, since):
            todo.append(writer)
    return todo


def _prediction(
    path: PurePosixPath,
    labels: np.ndarray,
    source: Path | None,
    writers: list[Writer],
    read_image: Callable[[Path], np.ndarray],
) -> Prediction:
    image = None
    if any(writer.needs_image for writer in writers):
        if source is None:
            raise ReclipError(f"overlay needs the image {path}, which is not available: omit the format overlay")
        image = read_image(source)
        if image.shape[:2] != labels.shape:
            raise ReclipError(
                f"image {source} has size {image.shape[1]}x{image.shape[0]}, its mask"
                f" {labels.shape[1]}x{labels.shape[0]}: the image was changed; predict again"
            )
    return Prediction(path, labels, image=image, source=source)
