"""Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020).

Shape letters: C classes, (H, W) size of the image in pixels, K neighbours of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.inference.refinements.base import REFINEMENTS, Grid, pixel_probabilities

_OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
_SIGMA = 0.1  # of the paper
_FLOOR = 1e-8


def neighbours(maps: Tensor, dilation: int) -> Tensor:
    """The 8 neighbours at a distance: ``(C, H, W)`` to ``(8, C, H, W)``; the image's border is repeated outside."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps[None], [dilation] * 4, mode="replicate")[0]
    return torch.stack(
        [padded[:, dilation * (1 + dy) :, dilation * (1 + dx) :][:, :height, :width] for dy, dx in _OFFSETS]
    )


def affinities(pixels: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights of each pixel's neighbours: ``softmax_j mean_c -|x_ic - x_jc| / (0.1 s_ic)``, with s the standard
    deviation of the neighbours.

    Args:
        pixels: ``(3, H, W)``, in any linear scale.

    Returns:
        ``(K, H, W)`` float32, K = 8 times the number of dilations, summing to 1.
    """
    near = torch.cat([neighbours(pixels, dilation) for dilation in dilations])
    # Not near.std(0), which takes 4 to 30 times as long over the first axis.
    spread = ((near - near.mean(0)).square_().sum(0) / (len(near) - 1)).sqrt_()
    distance = (near - pixels).abs() / (_FLOOR + _SIGMA * spread)
    return (-distance.mean(1)).softmax(0)


def refine(probabilities: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """``p_i <- sum_j w_ij p_j``, a number of times.

    Args:
        probabilities: ``(C, H, W)``.
        weights: ``(K, H, W)`` from :func:`affinities`.
    """
    height, width = probabilities.shape[-2:]
    reach = max(dilations)
    places = [(reach + dilation * dy, reach + dilation * dx) for dilation in dilations for dy, dx in _OFFSETS]
    for _ in range(iterations):
        padded = F.pad(probabilities[None], [reach] * 4, mode="replicate")[0]
        probabilities = torch.zeros_like(probabilities)
        # One neighbour at a time: a stack of all would need K times the memory, and many times the time.
        for weight, (y, x) in zip(weights, places, strict=True):
            probabilities.addcmul_(padded[:, y : y + height, x : x + width], weight)
    return probabilities


@REFINEMENTS.register()
class PAMR:
    """Averages the probabilities of neighbouring pixels of similar colour, at the size of the network's input.

    Classes are refined a few at a time, so that memory beyond the result does not grow with their number.
    """

    name = "pamr"
    needs_features = False
    needs_pixels = True

    def __init__(self, cfg: CfgNode) -> None:
        self.iterations = cfg.TEST.PAMR.ITERATIONS
        self.dilations = list(cfg.TEST.PAMR.DILATIONS)

    def __call__(self, grid: Grid) -> Grid:
        height, width = grid.size
        weights = affinities(grid.pixels.float(), self.dilations)
        refined = torch.empty(len(grid.logits), height, width, device=grid.logits.device)
        for classes, part in pixel_probabilities(grid):
            refined[classes] = refine(part, weights, self.dilations, self.iterations)
        return grid.at_pixels(refined)
