"""Batches of views whose features were encoded one view at a time, or read from a feature store.

Shape letters: B views, (h, w) patch grid of a view, D width of the joint embedding, C classes, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor

from reclip_d2.backbones.interface import VisionLanguageBackbone

PADDING_MODES = {"replicate": "replicate", "zeros": "constant"}


class ViewEncoder:
    """Encodes images one by one, for a feature store."""

    def __init__(self, backbone: VisionLanguageBackbone, mean: Tensor, std: Tensor) -> None:
        """
        Args:
            backbone: the frozen backbone.
            mean, std: pixel statistics ``(3, 1, 1)``, on the backbone's device.
        """
        self.backbone = backbone
        self.mean = mean
        self.std = std

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features Z ``(h, w, D)`` of an image ``(3, H, W)``, RGB in [0, 255], and its (H, W)."""
        normalised = (image.to(self.mean.device) - self.mean) / self.std
        images = ImageList.from_tensors([normalised], self.backbone.size_divisibility)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        return self.backbone.dense(images.tensor, [size])[0].permute(1, 2, 0), size


class ViewBatch(NamedTuple):
    """Image features of a batch of views."""

    features: Tensor
    """Z ``(B, D, h, w)`` on the largest grid."""
    image_sizes: list[tuple[int, int]]
    """(H, W) of each view."""
    grids: list[tuple[int, int]] | None
    """(h, w) of each view's features, at the top left; None if all have the grid of ``features``."""


def has_fixed_views(batched_inputs: Sequence[dict[str, Any]]) -> bool:
    """Whether a training batch consists of fixed views (``FEATURE_STORE``), with stored features or to be encoded one
    by one."""
    return "features" in batched_inputs[0] or bool(batched_inputs[0].get("fixed_view"))


def round_features(features: Tensor) -> Tensor:
    """Round features to half precision, as a store does. Views that are encoded in each iteration are rounded too, so
    that training on them is bit-identical to training from the store."""
    return features.to(torch.float16).to(torch.float32)


def pad_grid(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Pad maps ``(B, C, h, w)`` at the bottom and right to the grid ``size``.

    Args:
        mode: ``replicate`` or ``zeros``, the padding mode of the decoder's convolution, so that its output on the
            original grid does not change.
    """
    missing = (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2])
    return F.pad(maps, missing, mode=PADDING_MODES[mode]) if any(missing) else maps


def stack_on(device: torch.device, features: Sequence[Tensor]) -> Tensor:
    """Stack features ``(h, w, D)`` of one grid on a device: ``(B, h, w, D)``; from the host through pinned memory."""
    with torch.autocast(features[0].device.type, enabled=False):  # for bfloat16 it refuses to stack float16
        stacked = torch.stack(list(features))
    if device.type == "cuda" and stacked.device.type == "cpu":
        stacked = stacked.pin_memory()
    return stacked.to(device, non_blocking=True)


def batch_views(
    features: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    device: torch.device,
    mode: str = "replicate",
    smallest: tuple[int, int] = (0, 0),
) -> ViewBatch:
    """Batch views with different grids.

    Args:
        features: Z ``(h, w, D)`` of each view, in any precision.
        image_sizes: (H, W) of each view.
        device: device of the batch.
        mode: see :func:`pad_grid`.
        smallest: minimum (h, w) of the batch's grid.
    """
    grids = [(view.shape[0], view.shape[1]) for view in features]
    size = tuple(max(*(grid[axis] for grid in grids), smallest[axis]) for axis in (0, 1))
    if all(grid == size for grid in grids):
        stacked = stack_on(device, features).float()
        return ViewBatch(stacked.permute(0, 3, 1, 2), list(image_sizes), None)
    padded = [pad_grid(view.to(device).float().permute(2, 0, 1)[None], size, mode) for view in features]
    # Channels last in memory, like the backbone's output: the pooling operator reads contiguous features per patch.
    batch = torch.cat(padded).contiguous(memory_format=torch.channels_last)
    return ViewBatch(batch, list(image_sizes), grids)
