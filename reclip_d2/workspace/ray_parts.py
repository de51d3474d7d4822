"""Hypotheses and feature stores on Ray: workers compute parts in folders of their own, and return the files.

The images of the training and CLIP's weights must be readable on every machine, at the same path: also the smaller
copies or tiles of very large images, and the copies of images at URLs, which are in the output folder.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from detectron2.config import CfgNode

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.generate import HypothesisParts
from reclip_d2.hypothesis.training_records import TrainingImages, hypothesis_parts
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.one_maker import one_maker
from reclip_d2.utils.progress import count_steps, report_to
from reclip_d2.utils.work_parts import WorkParts
from reclip_d2.utils.work_shard import WorkShard
from reclip_d2.workspace.ray_engine import ENDED, Item, RayEngine, Row, Worker, worker_threads
from reclip_d2.workspace.stores import store_parts, training_parts

FILE = "file"


@dataclasses.dataclass(frozen=True)
class PartsJob:
    """All that a worker needs to make parts.

    Attributes:
        cfg: config of the training.
        images: its images; the workers have no data sets.
        stage: which parts: hypotheses or features.
        target: name of the file or folder that they are for.
        folder: name of the folder of their files, which depends on all that their content depends on.
        threads: PyTorch's threads per worker.
    """

    cfg: CfgNode
    images: TrainingImages
    stage: str
    target: str
    folder: str
    threads: int

    @property
    def device(self) -> str:
        """``MODEL.DEVICE``."""
        return self.cfg.MODEL.DEVICE

    @property
    def files(self) -> tuple[str, ...]:
        """The file of a part."""
        return (FILE,)


class PartsWorker(Worker):
    """Makes the files of parts: items are the ``name`` and the ``number`` of a part."""

    job: PartsJob
    unit: ClassVar[str] = "part"

    def prepare(self) -> None:
        """Find the parts for which this worker was made, with a folder of its own."""
        job, cfg = self.job, self.job.cfg.clone()
        self._scratch = tempfile.TemporaryDirectory(prefix="reclip_ray_")
        cfg.defrost()
        if job.stage == HypothesisParts.stage:
            cfg.HYPOTHESIS.FILE = str(Path(self._scratch.name) / job.target)
            found = [hypothesis_parts(cfg, job.images)]
        else:
            cfg.FEATURE_STORE.FOLDER = self._scratch.name
            found = store_parts(cfg, job.images)
        same = [parts for parts in found if parts is not None and parts.file(0).parent.name == job.folder]
        if not same:
            raise ReclipError(
                "it has other weights of CLIP, or another version of reclip_d2, than the process that sends the work"
            )
        self._parts = same[0]

    def row(self, item: Item, source: None) -> Row:
        """The content of the file of a part."""
        file = self._parts.file(item["number"])
        try:
            with report_to(None):  # the process that sends the work counts
                self._parts.make(WorkShard(item["number"] + 1, self._parts.count))
            return {}, {FILE: file.read_bytes()}
        finally:
            file.unlink(missing_ok=True)


def make_parts(engine: RayEngine, cfg: CfgNode, stores: bool = True) -> None:
    """Make what the hypotheses of ``cfg`` are made from, and its feature stores, except those for which there is no
    room. Each file is written as it arrives: an interrupted call leaves the others to do.

    Args:
        stores: whether also stores that the hypotheses do not read.

    Raises:
        ReclipError: a worker cannot start, a part fails, as it does without Ray, or it ends its workers.
    """
    images = TrainingImages.of(cfg)
    for parts in training_parts(cfg, images, stores):
        if parts.missing() and not parts.problem():
            with one_maker(parts.target, parts.stage):
                _make(engine, cfg, images, parts, parts.missing())


def _make(engine: RayEngine, cfg: CfgNode, images: TrainingImages, parts: WorkParts, missing: list[int]) -> None:
    if not missing:  # another run has made them meanwhile
        return
    folder = parts.file(0).parent.name
    job = PartsJob(cfg, images, parts.stage, parts.target.name, folder, worker_threads())
    total = sum(map(parts.steps, missing))
    with count_steps(parts.stage, total, unit=parts.unit) as steps:

        def write(header: dict[str, Any], files: dict[str, bytes]) -> None:
            if header["problem"]:
                raise ReclipError(header["problem"])
            number = int(header["name"])
            with atomic_write(parts.file(number)) as temporary:
                temporary.write_bytes(files[FILE])
            steps.advance(parts.steps(number))

        items = {str(number): {"name": str(number), "number": number} for number in missing}
        lost = engine.run(PartsWorker, job, items, write, largest=1)
    if lost:
        raise ReclipError(
            f"{len(lost)} of {len(missing)} parts of the {parts.stage} could not be made; of the first, {ENDED}."
            " The others are kept: repeat the command, with fewer workers if memory was short"
        )
