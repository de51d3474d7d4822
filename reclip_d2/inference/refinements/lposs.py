"""Label propagation over patches (LPOSS: Stojnic et al., CVPR 2025), on the features of the model itself.

Shape letters: C classes, D width of the features, n patches, k neighbours of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.inference.refinements.base import REFINEMENTS, Grid

_ROWS = 1024  # of the n x n similarities at a time
_POWER = 3
_DECAY = 0.01


def affinity_matrix(features: Tensor, places: Tensor, count: int) -> Tensor:
    """Sparse ``(n, n)`` weights ``max(cos(z_i, z_j), 0)^3 exp(-0.01 |p_i - p_j|)`` between each patch and its ``count``
    nearest by weight, made symmetric by the mean with the transpose, without self-loops; normalised by the square
    roots of the row sums.

    Args:
        features: ``(n, D)``.
        places: ``(n, 2)``: row and column of each patch.
        count: k, at most n - 1.
    """
    unit = F.normalize(features.float(), dim=1)
    places = places.float()
    indices, values = [], []
    for start in range(0, len(unit), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(unit)), device=unit.device)
        weights = (unit[rows] @ unit.T).clamp_(min=0).pow_(_POWER)
        weights *= torch.exp(-_DECAY * torch.cdist(places[rows], places))
        weights[torch.arange(len(rows)), rows] = -1
        best, columns = weights.topk(min(count, len(unit) - 1), dim=1)
        indices.append(torch.stack([rows[:, None].expand_as(columns).flatten(), columns.flatten()]))
        values.append(best.clamp_(min=0).flatten())
    index, value = torch.cat(indices, 1), torch.cat(values) / 2
    size = (len(unit), len(unit))
    ends, weights = torch.cat([index, index.flip(0)], 1), torch.cat([value, value])
    both = torch.sparse_coo_tensor(ends, weights, size, check_invariants=False).coalesce()
    degrees = torch.zeros(len(unit), device=unit.device).index_add_(0, both.indices()[0], both.values())
    roots = degrees.clamp(min=1e-12).rsqrt()
    i, j = both.indices()
    return torch.sparse_coo_tensor(
        both.indices(), both.values() * roots[i] * roots[j], size, check_invariants=False
    ).coalesce()


def propagate(weights: Tensor, labels: Tensor, alpha: float, iterations: int = 50, tolerance: float = 1e-5) -> Tensor:
    """F with ``(I - alpha W) F = Y``, by conjugate gradients for all columns at once.

    Args:
        weights: W ``(n, n)`` sparse, symmetric, with eigenvalues up to 1.
        labels: Y ``(n, C)``.
        alpha: in [0, 1).
        tolerance: of the residual, relative to Y, for each column.
    """
    solution = labels.clone()
    residual = labels - (solution - alpha * torch.sparse.mm(weights, solution))
    direction, squares = residual.clone(), (residual * residual).sum(0)
    target = tolerance**2 * (labels * labels).sum(0)
    for _ in range(iterations):
        if bool((squares <= target).all()):
            break
        moved = direction - alpha * torch.sparse.mm(weights, direction)
        step = squares / (direction * moved).sum(0).clamp(min=1e-30)
        solution = solution + step * direction
        residual = residual - step * moved
        following = (residual * residual).sum(0)
        direction = residual + following / squares.clamp(min=1e-30) * direction
        squares = following
    return solution


@REFINEMENTS.register()
class LPOSS:
    """Propagates the patches' probabilities to similar and near patches of the image."""

    name = "lposs"
    needs_features = True
    needs_pixels = False

    def __init__(self, cfg: CfgNode) -> None:
        self.neighbours = cfg.TEST.LPOSS.NEIGHBOURS
        self.alpha = cfg.TEST.LPOSS.ALPHA

    def __call__(self, grid: Grid) -> Grid:
        assert grid.features is not None
        cells = (grid.features.shape[-2], grid.features.shape[-1])
        logits = grid.logits
        if tuple(logits.shape[-2:]) != cells:
            logits = F.interpolate(logits[None], cells, mode="bilinear", align_corners=False)[0]
        rows, columns = grid.with_logits(logits).valid
        if rows * columns < 2:
            return grid
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(logits.device)
        features = grid.features[:, :rows, :columns].flatten(1).T
        labels = logits[:, :rows, :columns].softmax(0).flatten(1).T.float()
        weights = affinity_matrix(features, places, self.neighbours)
        found = propagate(weights, labels, self.alpha).clamp(min=1e-12)
        refined = (found / found.sum(1, keepdim=True)).log().T.unflatten(1, (rows, columns))
        padding = (0, cells[1] - columns, 0, cells[0] - rows)
        refined = F.pad(refined[None], padding, mode="replicate")[0]
        return grid.with_logits(refined)
