"""The parts of one image's logits: Query, bias, rectified and mask logits (Fig. 4 of ReCLIP++).

Shape letters: C classes, D width of the joint embedding, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reclip_d2.modeling.bias_head import bias_to_subtract, query_logits, rectified_logits
from reclip_d2.modeling.postprocessing import upsample_labels, upsample_logits

Mapper = Callable[[dict[str, Any]], dict[str, Any]]
"""Maps a record to a model's input: ``UnlabelledDatasetMapper(cfg, is_train=False)``."""


class LogitParts(NamedTuple):
    """Logits of one image on the grid of the padded image, on the CPU."""

    query: Tensor
    """M_q ``(C, h, w)``."""
    bias: Tensor
    """M_q - M ``(C, h, w)``: M_b if it is subtracted, -M_b if it is added."""
    rectified: Tensor
    """M ``(C, h, w)``, Eq. (3)."""
    mask: Tensor
    """M_o ``(C, h, w)``: the output of the mask decoder, or M without one."""
    padded_size: tuple[int, int]
    """(H, W) of the padded network input."""
    image_size: tuple[int, int]
    """(H, W) of the image in it."""

    def at_pixels(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample logits ``(c, h, w)`` of one of the parts, or of some classes, to an image's pixels, ``(c,
        *size)``."""
        return upsample_logits(logits[None], self.padded_size, self.image_size, size)[0]

    def labels(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Label map of shape ``size`` of one of the parts ``(C, h, w)``."""
        return upsample_labels(logits[None], self.padded_size, self.image_size, size)[0]


def has_bias(model: nn.Module) -> bool:
    """Whether a model rectifies CLIP's logits with a bias, as :func:`logit_parts` requires."""
    return hasattr(model, "bias_to_rectify") and getattr(model, "rectification", "none") != "none"


@torch.no_grad()
def logit_parts(model: nn.Module, mapper: Mapper, record: dict[str, Any]) -> LogitParts:
    """The logits of one image.

    Args:
        model: model of the rectification stage, in eval mode; see :func:`has_bias`.
        mapper: mapper with the test resolution.
        record: with ``file_name``.
    """
    image = model.preprocess_image([mapper(record)])
    features, mask = model.segment(image.tensor, image.image_sizes)
    query = query_logits(features, model.query_features)
    bias = bias_to_subtract(model.bias_to_rectify(features), model.rectification)
    rectified = rectified_logits(query, bias)
    padded_size, image_size = tuple(image.tensor.shape[-2:]), tuple(image.image_sizes[0])
    query, rectified, mask = (part[0].float().cpu() for part in (query, rectified, mask))
    return LogitParts(query, query - rectified, rectified, mask, padded_size, image_size)


def crop_to_image(logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Logits ``(..., h, w)`` without the cells whose centre is in the padding."""
    rows, columns = (
        max(1, math.ceil(cells * image / padded - 0.5))
        for cells, image, padded in zip(logits.shape[-2:], image_size, padded_size, strict=True)
    )
    return logits[..., :rows, :columns]
