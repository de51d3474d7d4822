"""Build the backbone that the meta-architectures need."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from reclip_d2.backbones.architectures import USUAL_SIDE, suits_resolution
from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)


def backbone_class(cfg: CfgNode) -> type[VisionLanguageBackbone]:
    """The class that ``MODEL.BACKBONE.NAME`` names, or raise :class:`ReclipError`."""
    name = cfg.MODEL.BACKBONE.NAME
    found = BACKBONE_REGISTRY.get(name) if name in BACKBONE_REGISTRY else None
    if not (isinstance(found, type) and issubclass(found, VisionLanguageBackbone)):
        raise ReclipError(f"MODEL.BACKBONE.NAME {name!r} is no frozen CLIP: set it to DenseCLIP")
    return found


def build_clip_backbone(cfg: CfgNode) -> VisionLanguageBackbone:
    """``MODEL.BACKBONE.NAME``, which must be a :class:`VisionLanguageBackbone`."""
    backbone = backbone_class(cfg)(cfg, ShapeSpec(channels=3))
    _warn_of_resolution(cfg, min(backbone.image_size))
    return backbone


def _warn_of_resolution(cfg: CfgNode, clip_side: int) -> None:
    """Log a warning where the config's images are far smaller or larger than those that the CLIP was trained with."""
    for key, side in (
        ("INPUT.MIN_SIZE_TEST", cfg.INPUT.MIN_SIZE_TEST),
        ("INPUT.MIN_SIZE_TRAIN", min(cfg.INPUT.MIN_SIZE_TRAIN)),
    ):
        if side and not suits_resolution(side, clip_side):  # 0 leaves images as they are
            logger.warning(
                "%s is %d px, and %s was trained at %d px: its features are poor at this size; the papers take 2.3"
                " times the CLIP's own, here %d px",
                key, side, cfg.MODEL.CLIP.NAME, clip_side, round(clip_side * 512 / USUAL_SIDE),
            )  # fmt: skip
            return
