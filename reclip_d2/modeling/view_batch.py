"""Batches of views whose features are encoded one view at a time, and those that come from a feature store.

Shape letters: B views, (h, w) patch grid of a view, D width of the joint embedding, C classes, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = {"replicate": "replicate", "zeros": "constant"}


class ViewBatch(NamedTuple):
    """Image features of a batch of views."""

    features: Tensor
    """Z ``(B, D, h, w)`` on the largest grid."""
    image_sizes: list[tuple[int, int]]
    """(H, W) of each view."""
    grids: list[tuple[int, int]] | None
    """(h, w) of each view's own features, which lie at the top left; None if all have the grid of ``features``."""


def has_fixed_views(batched_inputs: Sequence[dict[str, Any]]) -> bool:
    """Whether a training batch is of fixed views (``FEATURE_STORE``): their features come with them, or each view is to
    be encoded by itself."""
    return "features" in batched_inputs[0] or bool(batched_inputs[0].get("fixed_view"))


def round_features(features: Tensor) -> Tensor:
    """Features as a store gives them back: rounded to half precision. Views that are encoded again in each iteration go
    through this too, so that training on them is bit-identical to training from the store."""
    return features.to(torch.float16).to(torch.float32)


def pad_grid(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Maps ``(B, C, h, w)`` continued below and to the right to the grid ``size``.

    Args:
        mode: ``replicate`` or ``zeros``: as the decoder's convolution pads, so that inside the old grid it gives the
            same as without.
    """
    missing = (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2])
    return F.pad(maps, missing, mode=PADDING_MODES[mode]) if any(missing) else maps


def batch_views(
    features: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    device: torch.device,
    mode: str = "replicate",
    smallest: tuple[int, int] = (0, 0),
) -> ViewBatch:
    """A batch of views of any grids.

    Args:
        features: Z ``(h, w, D)`` of each view, of any precision.
        image_sizes: (H, W) of each view.
        mode: see :func:`pad_grid`.
        smallest: (h, w) that the batch's grid has at least.
    """
    grids = [(view.shape[0], view.shape[1]) for view in features]
    size = tuple(max(*(grid[axis] for grid in grids), smallest[axis]) for axis in (0, 1))
    if all(grid == size for grid in grids):
        stacked = torch.stack(list(features)).to(device, non_blocking=True).float()
        return ViewBatch(stacked.permute(0, 3, 1, 2), list(image_sizes), None)
    padded = [pad_grid(view.to(device).float().permute(2, 0, 1)[None], size, mode) for view in features]
    # Channels last in memory, as the backbone gives them: the pooling operator reads a patch's features in a row.
    batch = torch.cat(padded).contiguous(memory_format=torch.channels_last)
    return ViewBatch(batch, list(image_sizes), grids)
