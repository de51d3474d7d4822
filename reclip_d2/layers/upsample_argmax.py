"""Bilinear upsampling of class logits and argmax over the classes, in one pass.

Shapes: B images, C classes, h x w the logits' grid, H x W the label map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.layers._checks import accumulate_dtype, check_float
from reclip_d2.layers._extension import extension_loaded, kernels_enabled


def upsample_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Label map of bilinearly resized logits, without the intermediate (B, C, H, W) tensor.

    Equals ``F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)``, except where scores tie up
    to rounding; among equal scores the lowest class id wins.

    Args:
        logits: (B, C, h, w), any strides, float64, float32, float16 or bfloat16 (computed in float32 or wider).
        size: (H, W) of the label map, in pixels; larger or smaller than h x w.

    Returns:
        int64 labels (B, H, W) in 0 .. C-1; -1 where any interpolated score is NaN or infinite.

    Raises:
        TypeError, ValueError: for a wrong dtype or shape, an empty grid, no classes, or a size below 1.
    """
    op = "upsample_argmax"
    check_float(op, "logits", logits, "B,C,h,w")
    if 0 in logits.shape[1:]:
        raise ValueError(f"{op}: `logits` must have classes and a grid, got shape {tuple(logits.shape)}")
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"{op}: `size` must be (H,W) with both at least 1, got {tuple(size)}")
    height, width = size
    if kernels_enabled(logits.device.type):
        return torch.ops.reclip_d2.upsample_argmax(logits, height, width)
    return upsample_argmax_reference(logits, (height, width))


@torch.no_grad()
def upsample_argmax_reference(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Plain-PyTorch twin of :func:`upsample_argmax`, one image at a time: reference for the tests, and fallback."""
    labels = torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)
    for image in range(logits.shape[0]):
        grid = logits[image : image + 1].to(accumulate_dtype(logits.dtype))
        scores = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0]
        finite = torch.isfinite(scores).all(dim=0)
        # max() guarantees nothing on ties: take the first index of the maximum, the lowest id.
        first = (scores == scores.amax(dim=0)).to(torch.uint8).argmax(dim=0)
        labels[image] = torch.where(finite, first, -1)
    return labels


def _fake(logits: Tensor, height: int, width: int) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


if extension_loaded():
    torch.library.register_fake("reclip_d2::upsample_argmax", _fake)
