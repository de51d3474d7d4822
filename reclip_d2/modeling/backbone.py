"""Build the backbone that the meta-architectures need."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from reclip_d2.clip.dense import DenseCLIP
from reclip_d2.errors import ReclipError


def build_clip_backbone(cfg: CfgNode) -> DenseCLIP:
    """``MODEL.BACKBONE.NAME``, which must be a :class:`DenseCLIP`."""
    backbone = build_backbone(cfg)
    if not isinstance(backbone, DenseCLIP):
        raise ReclipError(f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} is no frozen CLIP: set it to DenseCLIP")
    return backbone
