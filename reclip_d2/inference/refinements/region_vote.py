"""Vote of regions: all pixels of a region get its mean probabilities (CorrCLIP's region vote). Regions are SLIC
superpixels, alone or merged by a helper model's features.

Shape letters: C classes, (H, W) size of the image in pixels, M superpixels, F width of the helper, (h, w) its grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reclip_d2.backbones.dense_attention.helper import HelperModel, build_helper
from reclip_d2.backbones.dense_attention.slic import superpixels
from reclip_d2.inference.refinements.base import REFINEMENTS, Grid, pixel_probabilities
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor


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


def merge_similar(regions: Tensor, features: Tensor, similarity: float) -> Tensor:
    """Merge neighbouring regions whose mean features have a cosine of at least ``similarity``, and what hangs together.

    Args:
        regions: ``(H, W)`` int64, ids from 0.
        features: ``(F, h, w)``, resized bilinearly to the pixels.

    Returns:
        ``(H, W)`` int64, ids from 0 without gaps.
    """
    height, width = regions.shape
    count, index = int(regions.max()) + 1, regions.flatten()
    sums = features.new_zeros(len(features), count)
    for start in range(0, len(features), 32):  # (F, H, W) would be large
        part = F.interpolate(features[None, start : start + 32], (height, width), mode="bilinear", align_corners=False)
        sums[start : start + 32].index_add_(1, index, part[0].flatten(1))
    means = F.normalize(sums, dim=0)  # a mean and a sum have the same direction
    pairs = torch.cat(
        [
            torch.stack([regions[:, 1:].flatten(), regions[:, :-1].flatten()]),
            torch.stack([regions[1:].flatten(), regions[:-1].flatten()]),
        ],
        dim=1,
    )
    first, second = pairs[:, pairs[0] != pairs[1]].unique(dim=1)
    similar = (means[:, first] * means[:, second]).sum(0) >= similarity
    first, second = (ids[similar].cpu().numpy() for ids in (first, second))
    graph = coo_array((torch.ones(len(first)).numpy(), (first, second)), shape=(count, count))
    merged = torch.from_numpy(connected_components(graph, directed=False)[1]).long().to(regions.device)
    return merged[index].unique(return_inverse=True)[1].view_as(regions)


@REFINEMENTS.register()
class RegionVote:
    """Averages the probabilities in each region of the network's input."""

    name = "region_vote"
    needs_features = False
    needs_pixels = True

    def __init__(self, cfg: CfgNode) -> None:
        keys = cfg.TEST.REGION_VOTE
        self.size = keys.SIZE
        self.compactness = keys.COMPACTNESS
        self.similarity = keys.SIMILARITY
        self.helper: HelperModel | None = None
        self._helper_config = cfg if keys.REGIONS == "helper" else None

    def bind(self, model: LanguageSegmentor) -> None:
        """Load the helper model, if there is one, to a model's device."""
        if self._helper_config is not None:
            self.helper = build_helper(self._helper_config).to(model.device)

    def regions(self, grid: Grid) -> Tensor:
        """Region of each pixel ``(H, W)`` int64, ids from 0."""
        height, width = grid.size
        found = superpixels(grid.pixels[None].float(), self.size, self.compactness)[0].view(height, width)
        if self.helper is None:
            return found
        side = self.helper.patch_size
        cells = (max(1, round(height / side)), max(1, round(width / side)))
        features = self.helper(grid.pixels[None].float(), cells)[0].T.unflatten(1, cells)
        return merge_similar(found, features, self.similarity)

    def __call__(self, grid: Grid) -> Grid:
        height, width = grid.size
        regions = self.regions(grid)
        voted = torch.empty(len(grid.logits), height, width, device=grid.logits.device)
        for classes, part in pixel_probabilities(grid):
            voted[classes] = region_means(part, regions)
        return grid.at_pixels(voted)
