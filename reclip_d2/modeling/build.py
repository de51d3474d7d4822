"""Check the names of registered parts before anything is built."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.registry import Registry

from reclip_d2.backbones.dense_attention import dense_attention_class
from reclip_d2.backbones.query import check_names_fit
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.datasets.custom import CUSTOM
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.backbone import backbone_class
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY
from reclip_d2.modeling.norm import build_norm


def check_registered_parts(cfg: CfgNode, num_classes: int | None = None) -> None:
    """Check the names of parts before anything is written.

    Args:
        num_classes: also check that the mask decoder's norm layer works for so many classes.

    Raises:
        ReclipError: open_clip does not know the CLIP; a meta-architecture, backbone, bias head or dense attention is in
            no registry, or is of another task of Detectron2's; a norm layer does not work; CLIP's text encoder cannot
            take a class name of ``DATASETS.CUSTOM.CLASSES``.
    """
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
        if key != "MODEL.STUDENT.BACKBONE" and registry.get(name).__module__.startswith("detectron2."):
            raise ReclipError(f"{key} {name!r} is of another task of Detectron2's: take {usual}")
    dense_attention_class(cfg.MODEL.CLIP.DENSE_ATTENTION)
    backbone_class(cfg).summary(cfg)
    if cfg.DATASETS.CUSTOM.CLASSES and {CUSTOM, CUSTOM_VAL} & {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        check_names_fit(read_class_file(cfg.DATASETS.CUSTOM.CLASSES), cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
    if num_classes is not None and cfg.MODEL.MASK_DECODER.ENABLED:
        build_norm(cfg.MODEL.MASK_DECODER.NORM, num_classes, "MODEL.MASK_DECODER.NORM")
