"""Build parts that the models share, and check the names of registered parts before anything is built."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.registry import Registry
from torch import nn

from reclip_d2.backbones.architectures import USUAL_SIDE, suits_resolution
from reclip_d2.backbones.dense_attention import dense_attention_class
from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.query import check_names_fit
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.datasets.custom import CUSTOM
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY

logger = logging.getLogger(__name__)


def backbone_class(cfg: CfgNode) -> type[VisionLanguageBackbone]:
    """The class of ``MODEL.BACKBONE.NAME``; raise :class:`ReclipError` if it is not a vision-language backbone."""
    name = cfg.MODEL.BACKBONE.NAME
    found = BACKBONE_REGISTRY.get(name) if name in BACKBONE_REGISTRY else None
    if not (isinstance(found, type) and issubclass(found, VisionLanguageBackbone)):
        raise ReclipError(f"MODEL.BACKBONE.NAME {name!r} is not a vision-language backbone: set it to DenseCLIP")
    return found


def build_clip_backbone(cfg: CfgNode) -> VisionLanguageBackbone:
    """Build ``MODEL.BACKBONE.NAME``, which must be a :class:`VisionLanguageBackbone`; within :func:`shared_backbones`,
    once for equal keys."""
    shared = _shared.get()
    if shared is None or cfg.MODEL.CLIP.FINE_TUNE:
        backbone = backbone_class(cfg)(cfg, ShapeSpec(channels=3))
    else:
        keys = cfg.MODEL
        key = (keys.BACKBONE.NAME, keys.DEVICE, str(keys.PIXEL_MEAN), str(keys.PIXEL_STD), keys.CLIP.dump())
        if key not in shared:
            shared[key] = backbone_class(cfg)(cfg, ShapeSpec(channels=3))
        backbone = shared[key]
    _warn_about_resolution(cfg, min(backbone.image_size))
    return backbone


_shared: contextvars.ContextVar[dict[tuple[str, ...], VisionLanguageBackbone] | None] = contextvars.ContextVar(
    "shared_backbones", default=None
)


@contextlib.contextmanager
def shared_backbones() -> Iterator[None]:
    """In the block, and this thread, models with equal keys share one frozen backbone: a run builds several models, and
    reading and hashing a CLIP's weights takes seconds."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def _warn_about_resolution(cfg: CfgNode, clip_side: int) -> None:
    """Warn if the config's images are far smaller or larger than the CLIP's training images."""
    for key, side in (
        ("INPUT.MIN_SIZE_TEST", cfg.INPUT.MIN_SIZE_TEST),
        ("INPUT.MIN_SIZE_TRAIN", min(cfg.INPUT.MIN_SIZE_TRAIN)),
    ):
        if side and not suits_resolution(side, clip_side):  # 0 leaves images as they are
            logger.warning(
                "%s is %d px, but %s was trained at %d px: its features are poor at this size; the papers use 2.3"
                " times the CLIP's training size, here %d px",
                key, side, cfg.MODEL.CLIP.NAME, clip_side, round(clip_side * 512 / USUAL_SIDE),
            )  # fmt: skip
            return


def build_norm(name: str, channels: int, key: str) -> nn.Module:
    """A norm layer over ``channels``.

    Args:
        name: a name for Detectron2's ``get_norm``: BN, SyncBN, FrozenBN, GN (channels a multiple of 32), or "" for
            none.
        channels: number of channels.
        key: config key with the name, for the message.

    Raises:
        ReclipError: there is no such norm, or it does not support this number of channels.
    """
    try:
        return get_norm(name, channels) or nn.Identity()
    except (KeyError, ValueError) as error:
        raise ReclipError(f"{key} {name!r} does not work for {channels} channels: use BN") from error


def check_registered_parts(cfg: CfgNode, num_classes: int | None = None) -> None:
    """Check the names of parts before anything is written.

    Args:
        num_classes: if given, also check that the mask decoder's norm works for this number of classes.

    Raises:
        ReclipError: open_clip does not know the CLIP; a meta-architecture, backbone, bias head or dense attention is
            not registered, or belongs to another task of Detectron2; a norm layer does not work; CLIP's text encoder
            cannot encode a class name of ``DATASETS.CUSTOM.CLASSES``.
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
            "RectifiedCLIP, MaskCLIP or MaskFolder",
        ),
        ("MODEL.STUDENT.BACKBONE", cfg.MODEL.STUDENT.BACKBONE, BACKBONE_REGISTRY, "build_dilated_resnet_backbone"),
    )
    for key, name, registry, usual in parts:
        if name not in registry:
            raise ReclipError(f"{key} {name!r} is not registered: use {usual}")
        if key != "MODEL.STUDENT.BACKBONE" and registry.get(name).__module__.startswith("detectron2."):
            raise ReclipError(f"{key} {name!r} belongs to another task of Detectron2: use {usual}")
    dense_attention_class(cfg.MODEL.CLIP.DENSE_ATTENTION)
    backbone_class(cfg).summary(cfg)
    if cfg.DATASETS.CUSTOM.CLASSES and {CUSTOM, CUSTOM_VAL} & {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        check_names_fit(read_class_file(cfg.DATASETS.CUSTOM.CLASSES), cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
    if cfg.DATASETS.VOCABULARY:
        classes = read_class_file(cfg.DATASETS.VOCABULARY, "DATASETS.VOCABULARY")
        check_names_fit(classes, cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
    if num_classes is not None and cfg.MODEL.MASK_DECODER.ENABLED:
        build_norm(cfg.MODEL.MASK_DECODER.NORM, num_classes, "MODEL.MASK_DECODER.NORM")
