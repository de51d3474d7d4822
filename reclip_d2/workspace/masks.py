"""Predict the masks of many images sequentially, skipping those that exist.

Shape letters: C classes of the masks, (H, W) size in pixels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import peek_pixels, read_image
from reclip_d2.data.tiling import Tiling
from reclip_d2.data.working_files import check_shape
from reclip_d2.errors import ReclipError
from reclip_d2.features.shards import StoredView
from reclip_d2.formats import IndexWriter, MaskClasses, Prediction, ScoresWriter, read_index
from reclip_d2.formats.geotiff import count_geo_pixels
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.files import open_to_append
from reclip_d2.utils.io import naming_errors, remove_leftovers
from reclip_d2.utils.json_files import read_json_lines
from reclip_d2.utils.progress import count_steps
from reclip_d2.utils.work_shard import WorkShard
from reclip_d2.workspace.stored_images import StoredImages

# Pixels per class of each mask, one line per image; next to the masks, so that they move together. Each shard has a
# file, since appending is not atomic on network file systems.
COVERAGE = ".coverage.jsonl"
_COVERAGE_FILES = ".coverage*.jsonl"
_COVERAGE_LINE = {
    "type": "object",
    "required": ["image_id", "pixels"],
    "properties": {
        "image_id": {"type": "string"},
        "pixels": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,5}$"},
            "additionalProperties": {"type": "integer", "minimum": 0},
        },
    },
}
LARGE = 50_000_000
"""Pixels: larger images are not decoded while the previous one is predicted."""
_STRIP = 256


class MaskClassTable:
    """Maps a model's classes to mask classes: the queries of a class are one class, and so are the background names,
    which may be ignored."""

    def __init__(self, classes: ClassList, keep_background: bool) -> None:
        self.ids = np.array(classes.mask_ids(keep_background), np.uint8)
        names = classes.mask_names(keep_background)
        kept = keep_background and bool(classes.background)
        self.mask_classes = MaskClasses.make(names, background=len(names) - 1 if kept else None)

    def predict(
        self,
        predictor: ImagePredictor,
        image: np.ndarray | StoredView,
        with_scores: bool,
        file: Path | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels ``(H, W)`` uint8 of an image ``(H, W, 3)`` uint8, or of its view in a feature store, and, optionally,
        scores ``(C, H, W)`` float16, see :meth:`class_logits`.

        Args:
            file: the image's file, by whose name regions are found (``TEST.REGION_VOTE.REGIONS masks``).
        """
        count = len(self.mask_classes.names)
        if isinstance(image, StoredView):
            size = image.placement.image_size
            bands = predictor.stored_bands(image.features, image.size, size)
        else:
            size = (image.shape[0], image.shape[1])
            bands = predictor.bands(image) if file is None else predictor.bands(image, file=file)
        labels = np.empty(size, np.uint8)
        scores = np.empty((count, *size), np.float16) if with_scores else None
        for band in bands:
            labels[band.rows] = self.ids[band.labels.cpu().numpy()]
            if scores is not None:
                scores[:, band.rows] = self.class_logits(band.logits).half().cpu().numpy()
        return labels, scores

    def class_logits(self, logits: Tensor) -> Tensor:
        """Logits ``(C, H, W)`` of the mask classes, from the model's: for a class with several queries, and for a kept
        background, the maximum over them, M_c = max_q M_q."""
        groups = (np.flatnonzero(self.ids == index) for index in range(len(self.mask_classes.names)))
        return torch.stack([logits[torch.from_numpy(group).to(logits.device)].amax(0) for group in groups])


Input = np.ndarray | StoredView
"""The pixels of an image, or its view in a feature store."""


def _read_ahead(
    images: Sequence[ImageFile], stored: StoredImages | None
) -> Iterator[tuple[ImageFile, Input | ReclipError]]:
    """Each image with its view or pixels, or the reason why it cannot be read; the next is decoded in the
    background."""

    def read(image: ImageFile) -> Input | ReclipError:
        view = None if stored is None else stored.view(image)
        if view is not None:
            return view
        try:
            return read_image(image.path)
        except ReclipError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        waiting: Future | None = None
        for index, image in enumerate(images):
            pixels = waiting.result() if waiting is not None else read(image)
            following = images[index + 1] if index + 1 < len(images) else None
            ahead = following is not None and peek_pixels(following.path) <= LARGE
            waiting = pool.submit(read, following) if ahead else None
            yield image, pixels
            del pixels  # freed before the next is decoded


def predict_masks(
    load: Callable[[], tuple[ImagePredictor, StoredImages | None]],
    images: Sequence[ImageFile],
    table: MaskClassTable,
    folder: Path,
    scores_folder: Path | None = None,
    stage: str = "masks",
    shard: WorkShard | None = None,
) -> dict[str, str]:
    """Write the masks missing in ``folder``.

    Args:
        load: loads a predictor and, if there are any, features of the images; called if a mask is missing.
        scores_folder: write scores there too; None for no scores.
        stage: name in progress events.
        shard: the part of a run's images that ``images`` are; other processes may write others to the folder.

    Returns:
        The reason for each image that could not be predicted, by image id.
    """
    if shard is None:
        remove_leftovers(folder)
    coverage_file = folder / coverage_name(shard)
    problems: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        index = stack.enter_context(IndexWriter(folder, table.mask_classes))
        scores_writer = stack.enter_context(ScoresWriter(scores_folder or folder, table.mask_classes))
        coverage = stack.enter_context(open_to_append(coverage_file))
        todo = [
            image
            for image in images
            if not index.is_done(image.name) or (scores_folder and not scores_writer.is_done(image.name))
        ]
        predictor, stored = load() if todo else (None, None)
        steps = stack.enter_context(count_steps(stage, len(todo)))
        for image, pixels in _read_ahead(todo, stored):
            problem = problem_of(image, pixels, predictor.tiling, with_scores=scores_folder is not None)
            if problem:
                problems[image.image_id] = problem
                steps.advance()
                continue
            labels, scores = table.predict(predictor, pixels, scores_folder is not None, image.path)
            prediction = Prediction(image.name, labels, scores=scores)
            if scores is not None:
                scores_writer.add(prediction)
            # Each line starts with a newline, since a kill may have truncated the line before.
            with naming_errors(coverage_file):
                coverage.write("\n" + json.dumps({"image_id": image.image_id, "pixels": count_pixels(labels)}))
                coverage.flush()
            index.add(prediction)  # last: an existing mask means that the image is done
            del pixels, labels, scores, prediction
            steps.advance()
    return problems


def coverage_name(shard: WorkShard | None) -> str:
    """Name of the file in which a run, or a shard of one, records the pixels of its masks."""
    return COVERAGE if shard is None else f".coverage-{shard.name}.jsonl"


def problem_of(image: ImageFile, pixels: Input | ReclipError, tiling: Tiling, with_scores: bool) -> str:
    """The reason why an image cannot be predicted; "" if it can."""
    if isinstance(pixels, ReclipError):
        return str(pixels)
    if isinstance(pixels, StoredView):  # checked before the training
        return ""
    size = (pixels.shape[0], pixels.shape[1])
    try:
        check_shape(image.path, size, tiling)
    except ReclipError as error:
        return str(error)
    if with_scores and tiling.applies_to(size):
        return f"image {image.path} is too large for the format scores: omit this format"
    return ""


def count_pixels(labels: np.ndarray) -> dict[str, int]:
    """Pixels per id in labels ``(H, W)`` uint8."""
    total = np.zeros(256, np.int64)
    for top in range(0, len(labels), _STRIP):  # in strips, since bincount converts to int64
        total += np.bincount(labels[top : top + _STRIP].ravel(), minlength=256)
    return {str(label): int(total[label]) for label in np.flatnonzero(total)}


def read_coverage(folder: Path, images: Sequence[ImageFile]) -> dict[str, Mapping[str, int]]:
    """Pixels per id of each image's mask, by image id; images without a mask are skipped.

    Masks without a line (or with a truncated one) are read.
    """
    files = sorted(folder.glob(_COVERAGE_FILES), key=lambda file: file.stat().st_mtime_ns)
    known = {line["image_id"]: line["pixels"] for file in files for line in read_json_lines(file, _COVERAGE_LINE)}
    result = {}
    for image in images:
        mask = folder / image.mask_name
        if not mask.exists():
            continue
        pixels = known.get(image.image_id)
        if not pixels and image.is_scene:
            pixels = count_geo_pixels(mask)
        result[image.image_id] = pixels or count_pixels(read_index(mask, MaskClasses.read(folder)))
    return result
