"""From logits on the patch grid to logits or labels at the output size.

Shape letters: B images, C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from reclip_d2.layers import upsample_argmax


def _upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def upsample_logits(
    logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Logits at the output size; padding is cropped before the final resize.

    Args:
        logits: ``(B, C, h, w)`` on the grid of the padded image, or already ``(B, C, *image_size)``.
        padded_size: (H, W) of the padded network input.
        image_size: (H, W) of the image in it, at the top left.
        output_size: (H, W) of the result.

    Returns:
        ``(B, C, *output_size)``.
    """
    if padded_size != image_size:
        logits = _upsample(logits, padded_size)[..., : image_size[0], : image_size[1]]
    return logits if tuple(logits.shape[-2:]) == output_size else _upsample(logits, output_size)


def upsample_labels(
    logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Labels ``(B, *output_size)`` int64: the argmax of :func:`upsample_logits`, computed without its (C, H, W) tensor
    if one resize is enough."""
    if padded_size == image_size:
        return upsample_argmax(logits, output_size)
    if image_size == output_size:
        return upsample_argmax(logits, padded_size)[..., : image_size[0], : image_size[1]]
    return upsample_logits(logits, padded_size, image_size, output_size).argmax(1)
