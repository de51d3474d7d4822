"""Masks on Ray: workers read an image, predict it, and return the files of its mask.

Only the images, the model and CLIP's weights must be readable on every machine; images may be at URLs.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.config import CfgNode

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import peek_pixels, read_image
from reclip_d2.data.remote_images import fetch
from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, Prediction
from reclip_d2.formats.writer import Writer
from reclip_d2.hypothesis.class_pruning import prune_classes, prunes_classes, with_left_out
from reclip_d2.utils.files import open_to_append
from reclip_d2.utils.io import atomic_write, naming_errors, remove_leftovers
from reclip_d2.utils.progress import count_steps
from reclip_d2.workspace.masks import COVERAGE, LARGE, MaskClassTable, count_pixels, problem_of
from reclip_d2.workspace.ray_engine import ENDED, LARGEST_BLOCK, Item, RayEngine, Row, Worker, worker_threads
from reclip_d2.workspace.trained_model import load_predictor

if TYPE_CHECKING:
    from reclip_d2.workspace.results import MaskRequest
    from reclip_d2.workspace.run_folder import RunFolder


SCORES_BLOCK = 8
"""Images of a block with scores, at most: those of an image can have some 10 MiB."""


@dataclasses.dataclass(frozen=True)
class MaskJob:
    """All that a worker needs to make masks.

    Attributes:
        cfg: config of the model.
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        classes: the model's classes.
        weights: its checkpoint.
        keep_background: whether masks have the background as a class.
        files: formats to make, in the order in which they are written.
        threads: PyTorch's threads per worker.
    """

    cfg: CfgNode
    kind: str
    classes: ClassList
    weights: Path
    keep_background: bool
    files: tuple[str, ...]
    threads: int

    @property
    def device(self) -> str:
        """``MODEL.DEVICE``."""
        return self.cfg.MODEL.DEVICE

    @property
    def table(self) -> MaskClassTable:
        """The classes of the masks."""
        return MaskClassTable(self.classes, self.keep_background)


class MaskWorker(Worker):
    """Makes the files of images: items are ``path``, ``name`` and ``url``."""

    job: MaskJob

    def prepare(self) -> None:
        """Load the model."""
        job = self.job
        self._predictor = load_predictor(job.cfg, job.kind, job.classes, job.weights)
        self._table = job.table
        self._scratch = tempfile.TemporaryDirectory(prefix="reclip_ray_")
        folder = Path(self._scratch.name)
        self._copies = folder / "copies"
        self._writers: dict[str, Writer] = {
            name: FORMATS[name](folder / name, self._table.mask_classes) for name in job.files
        }

    def read(self, item: Item) -> Path | np.ndarray:
        """The pixels of an image; of a large one its file, since two of them may not fit into memory."""
        image = _image(item)
        file = image.path
        if image.url and not file.exists():
            file = self._copies / image.name
            fetch(image.url, file)
        return file if peek_pixels(file) > LARGE else self._decode(file)

    def row(self, item: Item, source: Path | np.ndarray) -> Row:
        """The content of the files of an image, and pixels per id."""
        image = _image(item)
        pixels = self._decode(source) if isinstance(source, Path) else source
        if problem := problem_of(image, pixels, self._predictor.tiling, "scores" in self._writers):
            raise ReclipError(problem)
        labels, scores = self._table.predict(self._predictor, pixels, "scores" in self._writers)
        prediction = Prediction(image.name, labels, image=pixels, scores=scores)
        files = {}
        for name, writer in self._writers.items():
            writer.add(prediction)
            (file,) = writer.files(image.name)
            files[name] = file.read_bytes()
            file.unlink()
        return {"pixels": count_pixels(labels)}, files

    def _decode(self, file: Path) -> np.ndarray:
        try:
            return read_image(file)
        finally:
            if file.is_relative_to(self._copies):
                file.unlink(missing_ok=True)


def _image(item: Item) -> ImageFile:
    return ImageFile(Path(item["path"]), PurePosixPath(item["name"]), url=item["url"])


def write_masks(
    engine: RayEngine, job: MaskJob, images: Sequence[ImageFile], folder: Path, output: Path, stage: str = "masks"
) -> dict[str, str]:
    """Write the masks of images that have none.

    Args:
        job: what to make; its files are written below ``output``, except ``index``.
        folder: folder of the masks.
        output: the output folder.
        stage: name in progress events.

    Returns:
        The reason for each image that could not be predicted, by image id.
    """
    classes = job.table.mask_classes
    writers = {n: FORMATS[n](folder if n == "index" else output / n, classes) for n in job.files}
    todo = [i for i in images if not all(writers[n].is_done(i.name) for n in ("index", "scores") if n in writers)]
    by_name = {str(image.name): image for image in todo}
    problems: dict[str, str] = {}
    remove_leftovers(folder)
    if not todo:
        return problems
    with count_steps(stage, len(todo)) as steps, open_to_append(folder / COVERAGE) as coverage:

        def write(header: dict[str, Any], files: dict[str, bytes]) -> None:
            image = by_name[header["name"]]
            if header["problem"]:
                problems[image.image_id] = header["problem"]
            else:
                with naming_errors(folder / COVERAGE):
                    line = {"image_id": image.image_id, "pixels": header["pixels"]}
                    coverage.write("\n" + json.dumps(line))
                    coverage.flush()
                for name in job.files:
                    (file,) = writers[name].files(image.name)
                    with atomic_write(file) as temporary:
                        temporary.write_bytes(files[name])
            steps.advance()

        items = {name: {"path": str(i.path), "name": name, "url": i.url} for name, i in by_name.items()}
        largest = SCORES_BLOCK if "scores" in job.files else LARGEST_BLOCK
        lost = engine.run(MaskWorker, job, items, write, largest)
    return problems | {by_name[name].image_id: f"image {name}: {ENDED}" for name in lost}


def masks_on_ray(
    engine: RayEngine, folder: RunFolder, model: Callable[[str], tuple[CfgNode, Path]]
) -> Callable[[MaskRequest, Sequence[ImageFile], str], dict[str, str]]:
    """A :data:`~reclip_d2.workspace.results.MakeMasks` for an output folder.

    Args:
        model: config and checkpoint of a kind of model.
    """

    def make(request: MaskRequest, images: Sequence[ImageFile], stage: str) -> dict[str, str]:
        cfg, weights = model(request.kind)
        if prunes_classes(cfg):  # workers read no file of this machine for it
            cfg = with_left_out(cfg, prune_classes(cfg, request.classes.model_classes))
        formats = ["index", *request.formats]
        job = MaskJob(
            cfg=cfg,
            kind=request.kind,
            classes=request.classes,
            weights=weights,
            keep_background=request.background == "keep",
            # In this order: an existing mask means that its scores exist, and that it is not newer than the others.
            files=tuple(name for name in ("scores", "index", "palette", "overlay") if name in formats),
            threads=worker_threads(),
        )
        pictures = [image for image in images if not image.is_scene]  # this process makes those of GeoTIFFs
        return write_masks(engine, job, pictures, folder.masks, folder.path, stage)

    return make
