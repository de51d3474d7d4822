"""Vote of regions: all pixels of a superpixel get its mean probabilities (CorrCLIP's region vote, with SLIC).

Shape letters: C classes, (H, W) size of the image in pixels, M superpixels.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.backbones.dense_attention.slic import superpixels
from reclip_d2.inference.refinements.base import REFINEMENTS, Grid, pixel_probabilities


def region_means(values: Tensor, regions: Tensor) -> Tensor:
    """The mean of each region, at each of its pixels.

    Args:
        values: ``(C, H, W)``.
        regions: ``(H, W)`` int64, ids from 0.

    Returns:
        ``(C, H, W)``.
    """
    flat, index = values.flatten(1), regions.flatten()
    count = torch.bincount(index).clamp(min=1)
    sums = flat.new_zeros(len(flat), len(count)).index_add_(1, index, flat)
    return (sums / count)[:, index].view_as(values)


@REFINEMENTS.register()
class RegionVote:
    """Averages the probabilities in each superpixel of the network's input."""

    name = "region_vote"
    needs_features = False
    needs_pixels = True

    def __init__(self, cfg: CfgNode) -> None:
        self.size = cfg.TEST.REGION_VOTE.SIZE
        self.compactness = cfg.TEST.REGION_VOTE.COMPACTNESS

    def __call__(self, grid: Grid) -> Grid:
        height, width = grid.size
        regions = superpixels(grid.pixels[None].float(), self.size, self.compactness)[0].view(height, width)
        voted = torch.empty(len(grid.logits), height, width, device=grid.logits.device)
        for classes, part in pixel_probabilities(grid):
            voted[classes] = region_means(part, regions)
        return grid.at_pixels(voted)
