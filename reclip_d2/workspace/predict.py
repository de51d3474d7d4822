"""Masks of further images, with a trained model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from reclip_d2.data.geotiff import SceneReading
from reclip_d2.data.image_folder import ImageFile, find_images
from reclip_d2.data.remote_images import fetch_images
from reclip_d2.data.scene_files import mark_scenes
from reclip_d2.engine.logs import logging_to
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.class_pruning import uses_evidence
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.digest import current_digest, file_digest
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.utils.progress import ProgressCallback, report_to
from reclip_d2.utils.work_shard import WorkShard
from reclip_d2.workspace.class_pruning import pruning_stages
from reclip_d2.workspace.options import ENGINES, PredictOptions, RunOptions
from reclip_d2.workspace.predict_shard import predict_shard
from reclip_d2.workspace.ray_engine import RayEngine
from reclip_d2.workspace.ray_masks import masks_on_ray
from reclip_d2.workspace.results import MaskRequest, RunResult, report_transparency, write_results
from reclip_d2.workspace.run_folder import CHECKPOINT, RunFolder, check_same_inputs
from reclip_d2.workspace.run_state import RunState
from reclip_d2.workspace.stage_config import resolve_device, settings_of
from reclip_d2.workspace.trained_model import TrainedModel, load_predictor


def predict(
    images: StrPath | Sequence[StrPath],
    model: StrPath,
    output: StrPath,
    options: PredictOptions = PredictOptions(),  # noqa: B008 (immutable)
    *,
    progress: ProgressCallback | None = None,
) -> RunResult:
    """Write the masks of images, skipping those that exist.

    Args:
        images: as for :func:`~reclip_d2.workspace.segment.segment`.
        model: the output folder of a run.
        output: another folder: new, empty, or of an earlier call with the same model.
        progress: called with each :class:`~reclip_d2.utils.progress.Progress`.

    Raises:
        ReclipError: an input is wrong, or the folder contains masks of another model or of other images.
    """
    return PredictRun(images, model, output, options).predict(progress)


class PredictRun:
    """A prediction with checked inputs; nothing is written yet.

    Attributes:
        folder: the output folder.
        model: the trained model.
        cfg: its config.
        found: the images.
        shard: the part of them to predict; None for all.
        mine: the images of the shard.
        request: the masks to write.
    """

    def __init__(
        self,
        images: StrPath | Sequence[StrPath],
        model: StrPath,
        output: StrPath,
        options: PredictOptions = PredictOptions(),  # noqa: B008 (immutable)
    ) -> None:
        """Arguments and errors: see :func:`predict`."""
        self.folder = RunFolder(check_output_folder(output))
        source = RunFolder(model).path
        if self.folder.path == source:
            raise ReclipError(f"--output {os.fspath(output)} is the model's folder: name another")
        if self.folder.path in source.parents:
            raise ReclipError(f"--output {os.fspath(output)} contains the model's folder {source}: name another")
        self.options = options
        self.model = TrainedModel.find(model, options.use, options.pretrained)
        self.cfg = self.model.config(["MODEL.DEVICE", resolve_device(options.device), *options.opts])
        if uses_evidence(self.cfg) and not self.cfg.TEST.CLASS_EVIDENCE:  # the training has collected none
            self.cfg.TEST.CLASS_EVIDENCE = str(self.folder.evidence)
        sources = [images] if isinstance(images, str | os.PathLike) else images
        self.found = find_images(sources, [self.folder.path], self.folder.copies)
        if self.cfg.INPUT.GEO.ENABLED:
            self.found = mark_scenes(self.found)
        self.images = self.found.images
        self.shard, engine = shard_of(options), engine_of(options.engine, options.workers, options.shard)
        self.mine = self.images if self.shard is None else self.shard.of(self.images)
        reading = SceneReading.from_config(self.cfg)
        classes = self.model.state.classes
        self.request = MaskRequest(self.model.kind, classes, options.background, options.formats, reading)
        self.request.check(self.images, self.mine)
        job = (self.cfg, self.model.weights)
        self._make = None if engine is None else masks_on_ray(engine, self.folder, lambda _: job)

    def predict(self, progress: ProgressCallback | None = None) -> RunResult:
        """See the function :func:`predict`."""
        folder = self.folder
        folder.is_used()  # raises for a folder with other files
        if self.shard is not None:
            return predict_shard(self, progress)
        with folder.lock(), report_to(progress):
            if self.options.overwrite:
                folder.clear()
            folder.check_links()
            problems = self.fetch(self.images)
            state = self.remember(self.images)
            with logging_to(folder.run):
                report_transparency(self.images)
                self.prune()
                result = write_results(folder, state, self.request, self.images, problems, self.load, make=self._make)
            self.remove_copies()
            return result

    def prune(self) -> None:
        """Find the classes to leave out, from these images if the training has collected no class evidence."""
        for stage in pruning_stages(self.cfg, self.request.classes, self.images):
            stage.run()

    def fetch(self, images: Sequence[ImageFile]) -> dict[str, str]:
        """Copy the images at URLs that masks or formats will be made from, except GeoTIFFs; returns the reason for each
        that cannot be, by image id."""
        if not any(image.url for image in images):
            return {}
        self.folder.claim(self._wanted())
        if self._make is not None and not self.request.needs_images:
            return {}  # the workers fetch them
        needed = images if self.request.needs_images else self.folder.missing_masks(images, self.request.results)
        return fetch_images([image for image in needed if not image.is_scene])

    def remove_copies(self) -> None:
        """Remove the copies of images, unless the formats refer to them."""
        if not self.request.needs_images:
            self.folder.remove_copies()

    def load(self, kind: str) -> tuple[ImagePredictor, None]:
        """The predictor, and no stored features; see :data:`~reclip_d2.workspace.results.Load`."""
        return load_predictor(self.cfg, kind, self.request.classes, self.model.weights), None

    def _wanted(self) -> RunState:
        """The state of a folder with this run alone."""
        settings = {self.model.kind: {**settings_of(self.cfg), CHECKPOINT: file_digest(self.model.weights)}}
        return dataclasses.replace(self.model.state, settings=settings, results={}, entries=[], kept="")

    def remember(self, images: Sequence[ImageFile]) -> RunState:
        """Record this run and its images in the folder; raises for a folder of another model or of other images."""
        folder, model = self.folder, self.model
        images = [image for image in images if not image.url or image.path.exists()]
        wanted = self._wanted()
        known = None if self.options.overwrite else folder.read()
        if known is not None:
            _bring_up_to_date(known, model)
            check_same_inputs(folder, known, wanted)
            settings = {**known.settings, **wanted.settings}
            wanted = dataclasses.replace(wanted, settings=settings, results=known.results, entries=known.entries)
        signatures = folder.check_images(images, trained=False)
        folder.write(wanted)
        folder.remember_images(signatures)
        return wanted


def shard_of(options: RunOptions) -> WorkShard | None:
    """The part of the work that the options name.

    Raises:
        ReclipError: it is not ``I/N``, or is to overwrite the results of other parts.
    """
    if options.shard is None:
        return None
    if options.overwrite:
        raise ReclipError("--overwrite and --shard: shards share the folder; remove it, or name another --output")
    return WorkShard.parse(options.shard)


def engine_of(engine: str, workers: int | None, shard: str | None) -> RayEngine | None:
    """The engine that the options of :class:`RunOptions` name; None for this process.

    Raises:
        ReclipError: the options contradict each other, or Ray is not installed.
    """
    if engine not in ENGINES:
        raise ReclipError(f"--engine {engine} is unknown: use one of {', '.join(ENGINES)}")
    if engine == "local":
        if workers is not None:
            raise ReclipError("--workers: needs --engine ray")
        return None
    if shard is not None:
        raise ReclipError("--engine ray and --shard: Ray divides the work itself; give one of them")
    return RayEngine(workers)


def _bring_up_to_date(known: RunState, model: TrainedModel) -> None:
    """Replace an earlier version's record of the model's files by their digests."""
    known.weights = current_digest(known.weights, model.pretrained)
    settings = known.settings.get(model.kind, {})
    if settings.get(CHECKPOINT):
        settings[CHECKPOINT] = current_digest(settings[CHECKPOINT], model.weights)
