"""Tiny models and their exported files."""

from __future__ import annotations

import torch
from torch import Tensor

from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from tests.helpers import isolated_cache, make_maskclip, make_reclip, make_rectified, make_student

__all__ = ["isolated_cache"]


def _calibrated() -> LanguageSegmentor:
    model = make_maskclip(calibration="position_class", prompt_denoising=0.2, key_smoothing=0.5, mean_filter=3)
    model.calibration_offset = 0.1 * torch.randn(4, 5, 3)
    return model


MODELS = {
    "student": lambda: make_student(make_rectified()),
    "student with a classifier": lambda: make_student(make_rectified(), head="original", stride=16),
    "student of ReCLIP": lambda: make_student(make_reclip(), head="query_bias"),
    "ReCLIP++": make_rectified,
    "ReCLIP++, zeros, add": lambda: make_rectified(decoder={"padding_mode": "zeros"}, rectification="add"),
    "ReCLIP++, no decoder": lambda: make_rectified(decoder=False),
    "ReCLIP": make_reclip,
    "no rectification": lambda: make_rectified(rectification="none"),
    "MaskCLIP": make_maskclip,
    "MaskCLIP with all options": _calibrated,
}


def build(name: str) -> LanguageSegmentor:
    """One of :data:`MODELS`, as it predicts."""
    model = MODELS[name]().eval()
    with torch.no_grad():  # statistics of a batch norm that are not 0 and 1
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


def logits_of(model: LanguageSegmentor, image: Tensor) -> Tensor:
    """The model's own logits ``(1, C, H, W)`` of an image ``(1, 3, H, W)``."""
    return model([{"image": image[0]}])[0]["sem_seg"][None]
