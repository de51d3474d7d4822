"""MaskCLIP, CLIP's segmentation without training, and the controls that are reported with every result.

Shape letters: B images, C classes, (h, w) patch grid, n = h*w patches, E width of the image transformer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from reclip_d2.backbones.query import check_class_names, get_templates
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.bias_head import query_logits
from reclip_d2.modeling.meta_arch.base import ImageSizes
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.view_batch import ViewBatch


@META_ARCH_REGISTRY.register()
class MaskCLIP(CLIPSegmentor):
    """Query logits M_q, not rectified (section III-A), with MaskCLIP's two test-time options and two controls."""

    @configurable
    def __init__(
        self,
        *,
        prompt_denoising: float = 0.0,
        key_smoothing: float = 0.0,
        mean_filter: int = 0,
        calibration: str = "none",
        **segmentor: Any,
    ) -> None:
        """
        Args:
            prompt_denoising: see :func:`denoise_prompts`; 0 is off.
            key_smoothing: see :func:`smooth_by_keys`; 0 is off.
            mean_filter: control: side of a mean filter on the logits; 0 is off.
            calibration: ``class``, ``position_class`` or ``estimated`` adds ``calibration_offset``, found on unlabelled
                images by :func:`reclip_d2.engine.calibration.calibrate`.
            segmentor: arguments of :class:`CLIPSegmentor`.
        """
        super().__init__(**segmentor)
        self.prompt_denoising = prompt_denoising
        self.key_smoothing = key_smoothing
        self.mean_filter = mean_filter
        self.calibration = calibration
        # In checkpoints once it is found.
        self.calibration_offset: Tensor | None
        self.register_buffer("calibration_offset", None)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **super().from_config(cfg),
            "prompt_denoising": cfg.MODEL.MASKCLIP.PROMPT_DENOISING,
            "key_smoothing": cfg.MODEL.MASKCLIP.KEY_SMOOTHING,
            "mean_filter": cfg.MODEL.MASKCLIP.MEAN_FILTER,
            "calibration": cfg.MODEL.MASKCLIP.CALIBRATION,
        }

    def with_classes(
        self,
        class_names: list[list[str]],
        turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> MaskCLIP:
        """A model for other classes that shares this model's CLIP; it is not calibrated.

        Args:
            class_names: for each class its name and any synonyms.
            turn: makes a context that is entered around the encoding of each class.

        Raises:
            ReclipError: a name is empty or belongs to two classes.
        """
        check_class_names(class_names, self.backbone.name_tokens)
        features = self.backbone.query_features(class_names, get_templates(self.templates), turn)
        model = copy.copy(self)
        model._buffers = dict(self._buffers)  # copies of a module share them
        model.template_query_features = features.to(self.device)
        model.class_names = class_names
        model.calibration_offset = None
        return model

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        offset = state_dict.get(f"{prefix}calibration_offset")
        if self.calibration != "none" and isinstance(offset, Tensor):  # its size is known only now
            self.calibration_offset = torch.empty_like(offset, device=self.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        if self.training:
            raise ReclipError("MaskCLIP has nothing to train: add --eval-only")
        return super().forward(batched_inputs)

    def segment(self, images: Tensor, image_sizes: ImageSizes | None = None) -> tuple[Tensor, Tensor]:
        features, keys = self.backbone.dense_and_keys(images, image_sizes, keys=self.key_smoothing > 0)
        features = self.predicting_features(features)
        return features, self._options(features, keys)

    def segment_views(self, batch: ViewBatch) -> Tensor:
        """See :meth:`CLIPSegmentor.segment_views`. Key smoothing needs keys, which feature stores do not have."""
        if self.key_smoothing > 0:
            raise ReclipError("MODEL.MASKCLIP.KEY_SMOOTHING needs more than features: set FEATURE_STORE.VIEWS 0")
        return self._options(batch.features, None)

    def _options(self, features: Tensor, keys: Tensor | None) -> Tensor:
        """M_q with the test-time options and the controls."""
        logits = query_logits(features, self.query_features)
        if self.calibration != "none":
            logits = logits + self._offset(tuple(logits.shape[-2:]))
        scale = self.backbone.logit_scale
        if self.prompt_denoising > 0:
            logits = denoise_prompts(logits, scale, self.prompt_denoising)
        if keys is not None:
            logits = smooth_by_keys(logits, keys, scale, self.key_smoothing)
        if self.mean_filter:
            logits = mean_filter(logits, self.mean_filter)
        return logits

    def _offset(self, size: tuple[int, int]) -> Tensor:
        if self.calibration_offset is None:
            raise ReclipError(
                f"MODEL.MASKCLIP.CALIBRATION {self.calibration!r} needs unlabelled images: name a data set in"
                " DATASETS.TRAIN and run train_net.py --eval-only"
            )
        offset = self.calibration_offset[None]
        if offset.shape[-2:] in (size, (1, 1)):
            return offset
        # Computed on the training images' grid; resized for other resolutions.
        return F.interpolate(offset, size=size, mode="bilinear", align_corners=False)


def absent_classes(probabilities: Tensor, threshold: float) -> Tensor:
    """Classes whose highest probability in an image is below a threshold, without the image's best class.

    Args:
        probabilities: ``(B, C, h, w)``.

    Returns:
        ``(B, C)`` bool.
    """
    confidence = probabilities.amax((2, 3))
    return (confidence < threshold) & (confidence < confidence.amax(1, keepdim=True))


def denoise_prompts(logits: Tensor, scale: float, threshold: float) -> Tensor:
    """Prompt denoising of MaskCLIP: drop classes whose highest probability in the image is below the threshold.

    The best class of an image is never dropped.

    Args:
        logits: ``(B, C, h, w)`` cosine similarities.
        scale: CLIP's logit scale, for the softmax.
        threshold: in (0, 1).

    Returns:
        ``(B, C, h, w)``, with dropped classes at -1.
    """
    absent = absent_classes((logits * scale).softmax(1), threshold)
    return logits.masked_fill(absent[:, :, None, None], -1.0)  # the lowest cosine similarity


def smooth_by_keys(logits: Tensor, keys: Tensor, scale: float, threshold: float) -> Tensor:
    """Key smoothing of MaskCLIP: uncertain patches get the mean of all predictions, weighted by key similarity.

    ``pred_i <- sum_j cos(k_i, k_j) pred_j`` where the highest probability of patch i is below the threshold.

    Args:
        logits: ``(B, C, h, w)`` cosine similarities.
        keys: ``(B, n, E)`` of the last block.
        scale: CLIP's logit scale, for the softmax.
        threshold: in (0, 1].

    Returns:
        probabilities ``(B, C, h, w)``; not normalised at uncertain patches, which does not change the argmax.
    """
    probabilities = (logits * scale).softmax(1)
    keys = F.normalize(keys, dim=-1)
    weights = keys @ keys.transpose(1, 2)
    smooth = (weights @ probabilities.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, logits.shape[-2:])
    uncertain = probabilities.amax(1, keepdim=True) < threshold
    return torch.where(uncertain, smooth, probabilities)


def mean_filter(logits: Tensor, size: int) -> Tensor:
    """Mean of the logits ``(B, C, h, w)`` over a window of ``size`` x ``size`` patches, clipped at the border."""
    return F.avg_pool2d(logits, size, stride=1, padding=size // 2, count_include_pad=False)
