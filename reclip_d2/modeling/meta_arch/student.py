"""The distilled student as a model: DeepLab V2 with the inherited head. It runs without CLIP.

Shape letters: B images, C classes, D width of the joint embedding, (h, w) grid of the student's features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone
from torch import Tensor

from reclip_d2.backbones.query import check_class_names
from reclip_d2.config.keys import KEYS
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY
from reclip_d2.modeling.build import backbone_class
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.base import ImageSizes, LanguageSegmentor, inference_arguments
from reclip_d2.modeling.student.inherited import InheritedHead
from reclip_d2.modeling.student.network import DeepLabV2Head


@META_ARCH_REGISTRY.register()
class Student(LanguageSegmentor):
    """``image -> backbone -> DeepLabV2Head -> Z^ -> InheritedHead -> M^D`` (section III-E, Fig. 2b).

    Its checkpoint is self-contained: neither CLIP nor the teacher is built.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        feature_head: DeepLabV2Head,
        inherited: InheritedHead,
        clip_name: str,
        head: str,
        output_stride: int,
        image_format: str = "RGB",
        channels_last: str = "auto",
        settings: dict[str, Any] | None = None,
        **base: Any,
    ) -> None:
        """
        Args:
            backbone: a backbone with the output ``res5``.
            feature_head: maps ``res5`` to features Z^.
            inherited: Query head, bias logits and mask decoder.
            clip_name: the CLIP that defines the embedding space, for the identity.
            head: which components are inherited, for the identity; see
                :data:`~reclip_d2.modeling.student.inherited.HEADS`.
            output_stride: output stride of the backbone.
            image_format: channel order that the backbone expects.
            channels_last: memory format of the network: ``always``, ``never``, or ``auto``, channels last on a GPU in
                mixed precision, where convolutions are faster in it. Results are the same to rounding.
            settings: keys with other values than their defaults that the features depend on and the weights do not
                show; for the identity.
            base: arguments of :class:`LanguageSegmentor`; the pixel statistics are the backbone's.
        """
        super().__init__(**base)
        self.backbone = backbone
        self.feature_head = feature_head
        self.inherited = inherited
        self.clip_name = clip_name
        self.head = head
        self.output_stride = output_stride
        self.image_format = image_format
        self.channels_last = channels_last
        self.settings = settings or {}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.STUDENT
        backbone = BACKBONE_REGISTRY.get(keys.BACKBONE)(cfg, ShapeSpec(channels=3))
        if "res5" not in backbone.output_shape():
            raise ReclipError(
                f"MODEL.STUDENT.BACKBONE {keys.BACKBONE} has no output res5: use build_dilated_resnet_backbone"
            )
        class_names = class_names_from_config(cfg)
        check_class_names(class_names)
        clip = backbone_class(cfg).summary(cfg)
        return {
            **inference_arguments(cfg),
            "backbone": backbone,
            "feature_head": DeepLabV2Head(backbone.output_shape()["res5"].channels, clip.embed_dim, keys.DILATIONS),
            "inherited": empty_head(cfg, len(class_names)),
            "clip_name": clip.name,
            "head": keys.HEAD,
            "output_stride": keys.OUTPUT_STRIDE,
            "image_format": keys.FORMAT,
            "channels_last": keys.CHANNELS_LAST,
            "settings": _changed_settings(cfg),
            "class_names": class_names,
            "pixel_mean": list(keys.PIXEL_MEAN),
            "pixel_std": list(keys.PIXEL_STD),
        }

    @property
    def size_divisibility(self) -> int:
        return self.output_stride

    def identity(self) -> dict[str, Any]:
        """The student's weights are self-contained, so the identity has no fingerprint of a CLIP."""
        grid = self.inherited.bias_map
        rectified = {"rectification": "add"} if self.inherited.rectification == "add" else {}  # not in the weights
        return {
            **rectified,
            **self.settings,
            "clip": self.clip_name,
            "class_names": self.class_names,
            "templates": self.templates,
            "student_head": self.head,
            "bias_grid": None if grid is None else list(grid.shape[-2:]),
        }

    def former_identity(self) -> dict[str, Any]:
        return self.settings

    def normalize(self, image: Tensor) -> Tensor:
        image = image.to(self.device)
        image = image.flip(0) if self.image_format == "BGR" else image
        return (image - self.pixel_mean) / self.pixel_std

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        if self.training:
            raise ReclipError(
                "a student does not train without its teacher: set MODEL.META_ARCHITECTURE Distillation,"
                " or add --eval-only"
            )
        return super().forward(batched_inputs)

    def _raw_features(self, images: Tensor) -> Tensor:
        mixed_on_gpu = images.is_cuda and torch.is_autocast_enabled("cuda")
        if self.channels_last == "always" or (self.channels_last == "auto" and mixed_on_gpu):
            images = images.contiguous(memory_format=torch.channels_last)  # the layers keep it
        # Losses and the inherited head compute in float32, even under autocast.
        return self.feature_head(self.backbone(images)["res5"]).float()

    def features(self, images: Tensor) -> Tensor:
        """Features Z^ ``(B, D, h, w)``, each of length 1, of normalised, padded images."""
        return F.normalize(self._raw_features(images), dim=1)

    def segment(self, images: Tensor, image_sizes: ImageSizes | None = None) -> tuple[Tensor, Tensor]:
        """Z^ ``(B, D, h, w)`` and mask logits M^D ``(B, C, h, w)`` of normalised, padded images ``(B, 3, H, W)``.

        Args:
            image_sizes: not used: padding is part of the image for convolutions.
        """
        raw = self._raw_features(images)
        with torch.autocast(raw.device.type, enabled=False):
            features = F.normalize(raw, dim=1)
            return features, self.inherited(features if self.inherited.classifier is None else raw)

    def mask_logits(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        return self.segment(images, image_sizes)[1]

    def pixel_embedding(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        """Input of a linear probe, as in :class:`RectifiedCLIP`: concat(Z^, M^D) ``(B, D + C, h, w)``."""
        return torch.cat(self.segment(images, image_sizes), dim=1)


def _changed_settings(cfg: CfgNode) -> dict[str, Any]:
    """See the argument ``settings`` of :class:`Student`."""
    student = ("FORMAT", "PIXEL_MEAN", "PIXEL_STD", "OUTPUT_STRIDE", "DILATIONS")
    values = {f"MODEL.STUDENT.{key}": cfg.MODEL.STUDENT[key] for key in student}
    values["MODEL.RESNETS.STRIDE_IN_1X1"] = cfg.MODEL.RESNETS.STRIDE_IN_1X1
    plain = {key: list(value) if isinstance(value, list | tuple) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if value != KEYS[key].default}


def bias_grid(cfg: CfgNode) -> tuple[int, int]:
    """Grid (gh, gw) of the student's bias map: the teacher's grid at its training resolution."""
    short_side = min(cfg.INPUT.MIN_SIZE_TRAIN)
    size = [short_side, short_side]
    if cfg.INPUT.CROP.ENABLED:
        relative = cfg.INPUT.CROP.TYPE.startswith("relative")
        size = [side * short_side if relative else side for side in cfg.INPUT.CROP.SIZE]
    if min(size) <= 0:
        raise ReclipError(
            "with INPUT.MIN_SIZE_TRAIN 0 images are not resized: set INPUT.CROP.ENABLED and INPUT.CROP.SIZE, which give"
            " the size of the student's bias logits"
        )
    patch_size = backbone_class(cfg).summary(cfg).patch_size
    return math.ceil(size[0] / patch_size), math.ceil(size[1] / patch_size)


def empty_head(cfg: CfgNode, num_classes: int) -> InheritedHead:
    """The inherited head for a config, to be filled by the teacher or a checkpoint."""
    embed_dim = backbone_class(cfg).summary(cfg).embed_dim
    rectified = cfg.MODEL.TEACHER.META_ARCHITECTURE not in ("MaskCLIP", "MaskFolder")
    image_dependent = rectified and BIAS_HEAD_REGISTRY.get(cfg.MODEL.BIAS_HEAD.NAME).image_dependent
    return InheritedHead(
        torch.zeros(num_classes, embed_dim),
        head=cfg.MODEL.STUDENT.HEAD,
        bias_map=torch.zeros(num_classes, *bias_grid(cfg)) if rectified else None,
        class_bias=torch.zeros(num_classes, embed_dim) if image_dependent else None,
        mask_decoder=MaskDecoder(cfg, embed_dim, num_classes) if rectified and cfg.MODEL.MASK_DECODER.ENABLED else None,
        rectification=cfg.MODEL.BIAS_HEAD.RECTIFICATION,
    )
