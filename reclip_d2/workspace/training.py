"""The training stages: hypotheses, rectification, distillation. Each resumes where it was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.env import seed_all_rng

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.survey import SurveyedImage
from reclip_d2.engine.output_dir import remove_intermediate_checkpoints
from reclip_d2.engine.trainer import Trainer
from reclip_d2.hypothesis.training_records import build_training_records
from reclip_d2.inference.refinements import build_refinements
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.student.weights import load_backbone_weights
from reclip_d2.utils.progress import count_steps
from reclip_d2.workspace.ray_engine import RayEngine
from reclip_d2.workspace.ray_parts import make_parts


def register_training_images(images: Sequence[SurveyedImage], classes: ClassList) -> int:
    """Register the images' training files as the data set ``custom``; returns their number."""
    records = [record for image in images for record in _records(image.file, image.training_files)]
    register_images(records, classes)
    return len(records)


def bank_records(images: Sequence[ImageFile], trained_on: Sequence[SurveyedImage]) -> list[dict[str, str]]:
    """Records of the images that a bank is made from: the user's and, of GeoTIFFs, the training's windows."""
    files = {image.image_id: (image.path,) for image in images if not image.is_scene}
    files |= {image.file.image_id: image.training_files for image in trained_on if image.file.is_scene}
    return [record for image in images for record in _records(image, files.get(image.image_id, ()))]


def _records(image: ImageFile, files: Sequence[Path]) -> list[dict[str, str]]:
    """One record for each of the files that are used in place of an image."""
    return [
        {"file_name": str(path), "image_id": str(image.name) + (f"/{number}" if len(files) > 1 else "")}
        for number, path in enumerate(files)
    ]


class ReportProgress(HookBase):
    """Reports iterations, and every 20 iterations the median loss, to the listener of :mod:`reclip_d2.utils.progress`.

    A failed training reports no end, although :class:`~detectron2.engine.TrainerBase` calls ``after_train``.
    """

    def __init__(self, stage: str) -> None:
        """
        Args:
            stage: name of the training in events.
        """
        self._stage = stage

    def before_train(self) -> None:
        trainer = self.trainer
        self._steps = count_steps(self._stage, trainer.max_iter, unit="iteration", done=trainer.start_iter)
        self._steps.__enter__()

    def after_step(self) -> None:
        loss = None
        if (self.trainer.iter + 1) % 20 == 0:
            loss = f"loss {self.trainer.storage.history('total_loss').median(20):.3f}"
        if self.trainer.max_iter < self._steps.total:  # SOLVER.PLATEAU has brought the end forward
            self._steps.total = self.trainer.max_iter
        self._steps.advance(message=loss)

    def after_train(self) -> None:
        self._steps.__exit__(None, None, None)


def check_student_weights(cfg: CfgNode) -> None:
    """Raise :class:`ReclipError` if the student's initial weights are not available or do not fit: at the start, not
    after the rectification."""
    keys = cfg.MODEL.STUDENT
    if keys.WEIGHTS:
        load_backbone_weights(BACKBONE_REGISTRY.get(keys.BACKBONE)(cfg, ShapeSpec(channels=3)), keys.WEIGHTS)


def make_hypotheses(cfg: CfgNode, engine: RayEngine | None = None) -> None:
    """Write ``HYPOTHESIS.FILE``; an interrupted run's finished images are kept.

    Args:
        engine: makes what the file is made from, and the feature stores; None for this process.
    """
    if engine is not None:
        make_parts(engine, cfg)
    build_training_records(cfg)


def train(cfg: CfgNode, stage: str, engine: RayEngine | None = None) -> None:
    """Train ``cfg`` to the end, from its last checkpoint if there is one; only ``model_final.pth`` remains.

    Args:
        stage: name of the training in events.
        engine: makes feature stores that are missing; None for this process.
    """
    check_registered_parts(cfg)
    build_refinements(cfg)  # raises for unknown names, before anything is trained
    if engine is not None:
        make_parts(engine, cfg)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    trainer = Trainer(cfg, extra_hooks=[ReportProgress(stage)], keep_checkpoints=2)
    trainer.resume_or_load(resume=True)
    trainer.train()
    remove_intermediate_checkpoints(Path(cfg.OUTPUT_DIR))
