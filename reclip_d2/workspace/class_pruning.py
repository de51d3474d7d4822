"""Which classes a run leaves out, from its own unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.class_evidence import load_or_make_evidence
from reclip_d2.hypothesis.class_pruning import prune_classes, prunes_classes, uses_evidence
from reclip_d2.utils.progress import say
from reclip_d2.workspace.schedule import Stage
from reclip_d2.workspace.training import bank_records

STAGE = "class pruning"


def pruning_stages(
    cfg: CfgNode, classes: ClassList, images: Sequence[ImageFile], training: CfgNode | None = None
) -> list[Stage]:
    """The stage that finds the classes to leave out, and reports which and why; none if the config prunes no classes.

    Args:
        images: those that the class evidence is collected from, unless its file exists.
        training: config of a training, whose registered images are used instead.
    """
    if not prunes_classes(cfg):
        return []

    def run() -> None:
        if uses_evidence(cfg) and training is None:
            _collect(cfg, images, classes)
        elif uses_evidence(cfg):
            load_or_make_evidence(training, classes.model_classes)
        say(STAGE, str(prune_classes(cfg, classes.model_classes)))

    return [Stage(STAGE, lambda: False, run, lambda: None)]


def _collect(cfg: CfgNode, images: Sequence[ImageFile], classes: ClassList) -> None:
    """Collect the class evidence of images in ``TEST.CLASS_EVIDENCE``, unless the file exists.

    Registers ``custom`` with the classes, without images.

    Raises:
        ReclipError: there are only GeoTIFFs, which are not read as a whole.
    """
    if Path(cfg.TEST.CLASS_EVIDENCE).exists():
        return
    records = bank_records([image for image in images if image.path.exists()], [])
    if not records:
        raise ReclipError(
            "TEST.MIN_CLASS_SHARE and TEST.MIN_CLASS_CONFIDENCE look at local images that are not GeoTIFFs: set them"
            " to 0, or name the file of a training's images, TEST.CLASS_EVIDENCE"
        )
    register_images(records, classes)
    try:
        load_or_make_evidence(cfg, classes.model_classes)
    finally:
        register_images([], classes)
