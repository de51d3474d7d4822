"""Base of models that segment with a CLIP: the Query head, and the identity of their checkpoints.

Shape letters: B images, C classes, D width of the joint embedding, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.query import check_class_names, get_templates
from reclip_d2.config.keys import KEYS
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.modeling.build import build_clip_backbone
from reclip_d2.modeling.meta_arch.base import ImageSizes, LanguageSegmentor, inference_arguments
from reclip_d2.modeling.view_batch import ViewBatch, ViewEncoder, batch_views, has_fixed_views, round_features


class CLIPSegmentor(LanguageSegmentor):
    """Base of models that segment with a CLIP and its Query features. Subclasses define :meth:`segment` and
    :meth:`segment_views`.

    The state dict holds trained weights only; :meth:`identity`, which checkpoints record and compare, names the
    pretrained CLIP and the class list.
    """

    def __init__(
        self,
        backbone: VisionLanguageBackbone,
        query_features: Tensor,
        class_names: list[list[str]],
        *,
        statistics_from_weights: bool = False,
        half_features: bool = False,
        **base: Any,
    ) -> None:
        """
        Args:
            query_features: W_q ``(C, D)`` from the templates.
            class_names: for each class its name and any synonyms.
            statistics_from_weights: the pixel statistics come from the weights' settings, not from the config keys, see
                :func:`~reclip_d2.backbones.settings.pixel_statistics`.
            half_features: round image features to half precision in prediction, as feature stores do.
            base: arguments of :class:`LanguageSegmentor`; the pixel statistics are CLIP's.
        """
        super().__init__(class_names, **base)
        self.backbone = backbone
        self.statistics_from_weights = statistics_from_weights
        self.half_features = half_features
        self.register_buffer("template_query_features", query_features, persistent=False)
        self.register_load_state_dict_post_hook(_expect_no_frozen_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_clip_backbone(cfg)
        class_names = class_names_from_config(cfg)
        check_class_names(class_names, backbone.name_tokens)
        statistics = backbone.pixel_statistics
        return {
            **inference_arguments(cfg),
            "backbone": backbone,
            "query_features": backbone.query_features(class_names, get_templates(cfg.MODEL.CLIP.TEMPLATES)),
            "class_names": class_names,
            "pixel_mean": statistics.mean,
            "pixel_std": statistics.std,
            "statistics_from_weights": statistics.from_weights,
            "half_features": cfg.MODEL.CLIP.HALF_FEATURES,
        }

    @property
    def size_divisibility(self) -> int:
        return self.backbone.size_divisibility

    @property
    def query_features(self) -> Tensor:
        """Query text features W_q ``(C, D)``, the segmentation head: fixed, from the templates."""
        return self.template_query_features

    def segment(self, images: Tensor, image_sizes: ImageSizes | None = None) -> tuple[Tensor, Tensor]:
        """Image features Z ``(B, D, h, w)`` and mask logits M_o ``(B, C, h, w)`` of normalised, padded images.

        Args:
            image_sizes: (H, W) of each image without padding; None to treat padding as part of the image.
        """
        raise NotImplementedError

    def predicting_features(self, features: Tensor) -> Tensor:
        """Image features Z ``(B, D, h, w)`` as :meth:`segment` uses them: if ``half_features``, rounded, and in memory
        like those of :func:`batch_views`, since the sums of convolutions depend on the layout."""
        if not self.half_features:
            return features
        # Also the stride of a batch of one image, which contiguous() ignores, but not the choice of a convolution.
        return round_features(features).clone(memory_format=torch.channels_last)

    def segment_with_feedback(
        self, image: Tensor, image_sizes: ImageSizes | None, feedback: Feedback
    ) -> tuple[Tensor, Tensor]:
        """:meth:`segment` for one image, with feedback to the dense attention."""
        features = self.predicting_features(self.backbone.dense_with_feedback(image, image_sizes, feedback))
        size = (image.shape[-2], image.shape[-1])
        return features, self.segment_views(ViewBatch(features, list(image_sizes or [size]), None))

    def segment_views(self, batch: ViewBatch) -> Tensor:
        """Mask logits M_o ``(B, C, h, w)`` of views with given features: see :meth:`segment`."""
        raise NotImplementedError

    @property
    def view_encoder(self) -> ViewEncoder:
        """Encodes images one by one, as feature stores keep them."""
        return ViewEncoder(self.backbone, self.pixel_mean, self.pixel_std)

    def view_batch(self, batched_inputs: list[dict[str, Any]], smallest: tuple[int, int] = (0, 0)) -> ViewBatch:
        """Features of a training batch: encoded together; or, for fixed views (``FEATURE_STORE``), from the store
        (``features`` and ``view_size``) or encoded one by one (``fixed_view``).

        Args:
            smallest: minimum (h, w) of the batch's grid, for fixed views.
        """
        if not has_fixed_views(batched_inputs):
            images = self.preprocess_image(batched_inputs)
            features = self.backbone.dense(images.tensor, images.image_sizes)
            return ViewBatch(features, images.image_sizes, None)
        if "features" in batched_inputs[0]:
            views = [(x["features"], x["view_size"]) for x in batched_inputs]
        else:
            views = [self.view_encoder(x["image"]) for x in batched_inputs]
            views = [(round_features(features), size) for features, size in views]
        return batch_views(*zip(*views, strict=True), self.device, self.padding_mode, smallest)

    @property
    def padding_mode(self) -> str:
        """How features of smaller views are padded to a batch's grid: see :func:`pad_grid`."""
        return "replicate"

    def mask_logits(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        return self.segment(images, image_sizes)[1]

    def pixel_embedding(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        """Input of a linear probe: the image features Z ``(B, D, h, w)``. Arguments: see :meth:`segment`."""
        return self.segment(images, image_sizes)[0]

    def view_embedding(self, batch: ViewBatch) -> Tensor:
        """:meth:`pixel_embedding` of views with given features."""
        return batch.features

    def identity(self) -> dict[str, Any]:
        return checkpoint_identity(
            self.backbone,
            self.class_names,
            self.templates,
            getattr(self, "bias_head", None),
            (self.pixel_mean.flatten().tolist(), self.pixel_std.flatten().tolist()),
        )

    def former_identity(self) -> dict[str, Any]:
        recorded_since = {"MODEL.CLIP.VALUE_PATH_RESIDUAL"}
        if not self.statistics_from_weights:  # earlier versions normalised by the config keys
            recorded_since |= {"MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
        return {key: value for key, value in self.identity().items() if key in recorded_since}


def checkpoint_identity(
    backbone: VisionLanguageBackbone,
    class_names: list[list[str]],
    templates: str,
    bias_head: nn.Module | None = None,
    pixel_statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Identity of a checkpoint: all that its image and text features depend on.

    Contains the backbone's identity, the class list, the templates and, if they are not the defaults, the pixel
    statistics and the texts and norm of the Reference prompt. Image sizes and precision are not part of it: they may
    differ between training and use.

    Args:
        pixel_statistics: mean and standard deviation; None for the defaults.
    """
    changed: dict[str, Any] = {}
    for key, values in zip(("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"), pixel_statistics or (), strict=False):
        rounded = [round(value, 4) for value in values]  # converted from float32
        if rounded != KEYS[key].default:
            changed[key] = rounded
    identity = {**backbone.identity(), **changed, "class_names": class_names, "templates": templates}
    prompt = getattr(bias_head, "reference_prompt", None)
    if prompt is not None:
        usual = [[*backbone.name_tokens(names[0]), backbone.end_token] for names in class_names]
        if prompt.segments != usual or bias_head.reference_norm != "row":
            identity["reference"] = f"{bias_head.reference_norm} {prompt.digest()}"
    return identity


def _expect_no_frozen_weights(module: CLIPSegmentor, incompatible_keys: Any) -> None:
    """Load-state-dict hook: do not report the CLIP's frozen weights as missing, since no checkpoint has them."""
    trained = module.backbone.state_dict()

    def frozen(key: str) -> bool:
        _, found, name = f".{key}".rpartition(".backbone.")
        return bool(found) and name not in trained

    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if not frozen(key)]
