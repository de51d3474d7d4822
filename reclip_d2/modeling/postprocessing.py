"""From logits on the patch grid to logits or labels at the wanted size, and sliding windows.

Shape letters: B images, C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from reclip_d2.data.tiling import window_starts
from reclip_d2.layers import upsample_argmax


def _upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def upsample_logits(
    logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Logits at the output size; the padding is cropped off before the resize.

    Args:
        logits: ``(B, C, h, w)`` on the grid of the padded image, or already ``(B, C, *image_size)``.
        padded_size: (H, W) of the padded network input.
        image_size: (H, W) of the image in it, at the top left.
        output_size: (H, W) wanted.

    Returns:
        ``(B, C, *output_size)``.
    """
    if padded_size != image_size:
        logits = _upsample(logits, padded_size)[..., : image_size[0], : image_size[1]]
    return logits if tuple(logits.shape[-2:]) == output_size else _upsample(logits, output_size)


def upsample_labels(
    logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Labels ``(B, *output_size)`` int64: the argmax of :func:`upsample_logits`, without its (C, H, W) tensor
    where one resize is enough."""
    if padded_size == image_size:
        return upsample_argmax(logits, output_size)
    if image_size == output_size:
        return upsample_argmax(logits, padded_size)[..., : image_size[0], : image_size[1]]
    return upsample_logits(logits, padded_size, image_size, output_size).argmax(1)


def sliding_windows(
    image_size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of overlapping windows that cover the image."""
    for top in window_starts(image_size[0], window[0], stride[0]):
        for left in window_starts(image_size[1], window[1], stride[1]):
            yield slice(top, min(top + window[0], image_size[0])), slice(left, min(left + window[1], image_size[1]))


def sliding_window_logits(
    image: Tensor,
    predict: Callable[[Tensor], Tensor],
    window: tuple[int, int],
    stride: tuple[int, int],
) -> Tensor:
    """Mean logits of overlapping windows.

    Args:
        image: ``(3, H, W)``.
        predict: maps a window ``(3, wh, ww)`` to logits ``(C, wh, ww)``.
        window, stride: (height, width) in pixels.

    Returns:
        ``(C, H, W)``.
    """
    height, width = image.shape[-2:]
    total: Tensor | None = None
    count = image.new_zeros(height, width)
    for rows, columns in sliding_windows((height, width), window, stride):
        logits = predict(image[:, rows, columns])
        if total is None:
            total = logits.new_zeros(logits.shape[0], height, width)
        total[:, rows, columns] += logits
        count[rows, columns] += 1
    assert total is not None
    return total / count
