"""Check the names of registered parts before anything is built."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.registry import Registry

from reclip_d2.errors import ReclipError
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY


def check_registered_parts(cfg: CfgNode) -> None:
    """Raise :class:`ReclipError` for a meta-architecture, backbone or bias head that no registry knows."""
    parts: tuple[tuple[str, str, Registry, str], ...] = (
        (
            "MODEL.META_ARCHITECTURE",
            cfg.MODEL.META_ARCHITECTURE,
            META_ARCH_REGISTRY,
            "RectifiedCLIP, MaskCLIP or Distillation",
        ),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY, "DenseCLIP"),
        (
            "MODEL.BIAS_HEAD.NAME",
            cfg.MODEL.BIAS_HEAD.NAME,
            BIAS_HEAD_REGISTRY,
            "ReCLIPPPBiasHead or ReCLIPBiasHead",
        ),
        (
            "MODEL.TEACHER.META_ARCHITECTURE",
            cfg.MODEL.TEACHER.META_ARCHITECTURE,
            META_ARCH_REGISTRY,
            "RectifiedCLIP or MaskCLIP",
        ),
        ("MODEL.STUDENT.BACKBONE", cfg.MODEL.STUDENT.BACKBONE, BACKBONE_REGISTRY, "build_dilated_resnet_backbone"),
    )
    for key, name, registry, usual in parts:
        if name not in registry:
            raise ReclipError(f"{key} {name!r} is not registered: take {usual}")
