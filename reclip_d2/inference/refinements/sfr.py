"""Semantic feedback refinement, the second module of ResCLIP (Yang et al., CVPR 2025): predicted labels change the
attention of the last block, in a second pass.

With the label L_i of each patch, from the logits so far, the relation of two patches is

    R_ij = [L_i = L_j] (1 if the straight line from i to j stays in patches of this label, else exp(-d_ij / d_max)),

with Chebyshev distances d and d_max the grid's largest. Each row of R is smoothed by a Gaussian along the patches in
row-major order, divided by its sum, and all by the largest entry: A_ij. Scores s of the dense attention become

    tau ((1 - lambda) s_ij + lambda A_ij),

to which NACLIP's Gaussian is added as before; class tokens have A = 0. This follows the public code, but there a line
between patches at distance d is looked at on its first d / d_max only, and patches with no confident label get the
first class; here they get a label of their own.

Shape letters: C classes, (H, W) size in pixels, (h, w) grid of the patches in the image, n = h*w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.backbones.dense_attention import DENSE_ATTENTION_REGISTRY, dense_attention_class
from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.backbones.dense_attention.rows import MAX_SCORES
from reclip_d2.errors import ReclipError
from reclip_d2.inference.refinements.base import REFINEMENTS, Grid, pixel_probabilities
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor

_FLOOR = 1e-8


def patch_labels(grid: Grid, patch: int, size: tuple[int, int], threshold: float) -> Tensor:
    """The most frequent label of each patch's pixels: ``(h, w)`` int64; C where none is at least ``threshold``.

    Args:
        patch: side of a patch in pixels.
        size: (h, w), at most as many patches as contain a pixel.
        threshold: pixels whose highest probability is lower have the label C.
    """
    height, width = grid.size
    best = torch.full((height, width), -1.0, device=grid.logits.device)
    labels = torch.zeros((height, width), dtype=torch.int64, device=grid.logits.device)
    for classes, part in pixel_probabilities(grid):
        confidence, index = part.max(0)
        labels = torch.where(confidence > best, index + classes.start, labels)
        best = torch.maximum(best, confidence)
    count = len(grid.logits)
    labels[best < threshold] = count
    labels = labels[: size[0] * patch, : size[1] * patch]
    rows, columns = (torch.arange(side, device=labels.device) // patch for side in labels.shape)
    places = rows[:, None] * size[1] + columns
    votes = torch.bincount((places * (count + 1) + labels).flatten(), minlength=size[0] * size[1] * (count + 1))
    return votes.view(*size, count + 1).argmax(-1)


def is_connected(labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Whether two patches have the same label, and whether the straight line between them does not leave it.

    The line from i to j has the points ``i + (j - i) k / d``, k = 0 ... d, rounded (halves to even numbers).

    Args:
        labels: ``(h, w)``.
        rows: the patches i.

    Returns:
        two ``(rows, n)`` bool.
    """
    width, flat = labels.shape[1], labels.flatten()
    places = torch.arange(len(flat), device=flat.device)
    same = flat[rows, None] == flat
    connected = same.clone()
    first, last = same.nonzero().int().unbind(1)
    start, end = places[rows][first.long()].int(), last
    y, x = start.div(width, rounding_mode="floor"), start % width
    dy, dx = end.div(width, rounding_mode="floor") - y, end % width - x
    distance = torch.maximum(dy.abs(), dx.abs())
    mixed = ~_is_uniform(labels, y, x, y + dy, x + dx)  # other lines stay inside
    first, last, y, x, dy, dx, distance = (one[mixed] for one in (first, last, y, x, dy, dx, distance))
    step = 0
    while True:
        step += 1
        left = distance > step
        if not bool(left.any()):
            return same, connected
        first, last, y, x, dy, dx, distance = (one[left] for one in (first, last, y, x, dy, dx, distance))
        row, column = (_rounded(at * distance + by * step, distance) for at, by in ((y, dy), (x, dx)))
        inside = flat[(row * width + column).long()] == flat[last.long()]
        connected[first[~inside].long(), last[~inside].long()] = False
        first, last, y, x, dy, dx, distance = (one[inside] for one in (first, last, y, x, dy, dx, distance))


def _is_uniform(labels: Tensor, y: Tensor, x: Tensor, other_y: Tensor, other_x: Tensor) -> Tensor:
    """Whether the rectangles with two corners each have one label: no two neighbours in them differ."""
    top, bottom = torch.minimum(y, other_y), torch.maximum(y, other_y)
    left, right = torch.minimum(x, other_x), torch.maximum(x, other_x)
    width = labels.shape[1] + 1

    def changes(differs: Tensor, below: Tensor, beyond: Tensor) -> Tensor:
        """Those with row in ``[top, below)`` and column in ``[left, beyond)``, by a table of sums."""
        missing = (1, labels.shape[1] - differs.shape[1], 1, labels.shape[0] - differs.shape[0])
        sums = F.pad(differs.int(), missing).cumsum(0).cumsum(1).int().flatten()
        corners = (below * width + beyond, top * width + beyond, below * width + left, top * width + left)
        ends = [sums[corner.long()] for corner in corners]
        return ends[0] - ends[1] - ends[2] + ends[3]

    across = changes(labels[:, 1:] != labels[:, :-1], bottom + 1, right)
    down = changes(labels[1:] != labels[:-1], bottom, right + 1)
    return (across == 0) & (down == 0)


def _rounded(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The nearest whole number of a fraction; the even one of two."""
    whole = numerator.div(denominator, rounding_mode="floor")
    rest = 2 * (numerator - whole * denominator)
    return whole + ((rest > denominator) | ((rest == denominator) & (whole % 2 == 1))).int()


class LabelRelations:
    """A ``(n, n)`` of a label map, by rows. Kept in memory if it is at most as large as other scores."""

    def __init__(self, labels: Tensor, sigma: float) -> None:
        """
        Args:
            labels: ``(h, w)``.
            sigma: standard deviation of the smoothing, in patches.
        """
        self.labels = labels
        count = labels.numel()
        size = min(count, int(6 * sigma + 1)) // 2 * 2 + 1
        offsets = torch.arange(size, device=labels.device, dtype=torch.float32) - size // 2
        self._kernel = torch.exp(-offsets.square() / (2 * sigma**2))
        self._kernel /= self._kernel.sum()
        step = max(1, MAX_SCORES // (8 * count))  # lists of pairs take more than scores
        blocks = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        self._kept: Tensor | None = None
        if count * count <= MAX_SCORES:
            kept = torch.cat([self._smoothed(rows) for rows in blocks])
            self._largest = kept.max()
            self._kept = kept / self._largest
        else:
            self._largest = torch.stack([self._smoothed(rows).max() for rows in blocks]).max()

    def rows(self, rows: slice) -> Tensor:
        """``(rows, n)`` of A, from 0 to 1."""
        return self._kept[rows] if self._kept is not None else self._smoothed(rows) / self._largest

    def _smoothed(self, rows: slice) -> Tensor:
        width, count = self.labels.shape[1], self.labels.numel()
        same, connected = is_connected(self.labels, rows)
        places = torch.arange(count, device=same.device)
        y, x = places.div(width, rounding_mode="floor"), places % width
        distance = torch.maximum((y[rows, None] - y).abs(), (x[rows, None] - x).abs())
        farthest = max(*self.labels.shape, 2) - 1
        relation = torch.where(connected, 1.0, same * torch.exp(-distance.float() / farthest))
        smooth = F.conv1d(relation[:, None], self._kernel[None, None], padding=len(self._kernel) // 2)[:, 0]
        return smooth / (smooth.sum(1, keepdim=True) + _FLOOR)


@REFINEMENTS.register()
class SFR:
    """Predicts again, with the labels so far fed back to the attention of the last block."""

    name = "sfr"
    needs_features = False
    needs_pixels = True

    def __init__(self, cfg: CfgNode) -> None:
        chosen = cfg.MODEL.CLIP.DENSE_ATTENTION
        if not dense_attention_class(chosen).takes_feedback:
            names = ", ".join(sorted(name for name, one in DENSE_ATTENTION_REGISTRY if one.takes_feedback))
            raise ReclipError(
                f"TEST.REFINE sfr changes the scores of a soft-max over the last block's tokens, which"
                f" MODEL.CLIP.DENSE_ATTENTION {chosen} lacks: choose one of {names}, or remove sfr"
            )
        if cfg.MODEL.META_ARCHITECTURE in ("Distillation", "Student"):
            raise ReclipError("TEST.REFINE sfr changes CLIP's attention, which a student does not have: remove it")
        if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP" and cfg.MODEL.MASKCLIP.KEY_SMOOTHING > 0:
            raise ReclipError("TEST.REFINE sfr does not work with MODEL.MASKCLIP.KEY_SMOOTHING: remove one of the two")
        self.weight = cfg.TEST.SFR.WEIGHT
        self.scale = cfg.TEST.SFR.SCALE
        self.threshold = cfg.TEST.SFR.THRESHOLD
        self.sigma = cfg.MODEL.CLIP.NACLIP_SIGMA
        self._patch = 0

    def bind(self, model: LanguageSegmentor) -> None:
        """Set the model that predicts again."""
        if not isinstance(model, CLIPSegmentor):
            raise ReclipError("TEST.REFINE sfr changes CLIP's attention, which a student does not have: remove it")
        self._patch = model.backbone.patch_size

    def __call__(self, grid: Grid) -> Grid:
        assert grid.again is not None and self._patch
        patch = self._patch
        height, width = (-(-side // patch) for side in grid.size)
        inside = (height, width)
        if not grid.padding_counts:  # as valid_patches: patches whose centre is in the image
            rows, columns = (max(1, (2 * side + patch - 1) // (2 * patch)) for side in grid.size)
            inside = (rows, columns)
        labels = patch_labels(grid, patch, inside, self.threshold)
        relations = LabelRelations(labels, self.sigma)

        def bias(rows: slice) -> Tensor:
            return self.scale * self.weight * on_grid(relations, rows, (height, width))

        return grid.again(Feedback(self.scale * (1 - self.weight), bias))


def on_grid(relations: LabelRelations, rows: slice, grid: tuple[int, int]) -> Tensor:
    """``(rows, n')`` of A for patches of a grid (h', w') whose top left patches have labels; 0 for the others."""
    height, width = relations.labels.shape
    if (height, width) == grid:
        return relations.rows(rows)
    places = torch.arange(grid[0] * grid[1], device=relations.labels.device)[rows]
    y, x = places.div(grid[1], rounding_mode="floor"), places % grid[1]
    known = (y < height) & (x < width)
    result = torch.zeros(len(places), *grid, device=places.device)
    if bool(known.any()):
        own = (y * width + x)[known]
        span = relations.rows(slice(int(own[0]), int(own[-1]) + 1))
        result[known, :height, :width] = span[own - own[0]].unflatten(1, (height, width))
    return result.flatten(1)
