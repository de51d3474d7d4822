"""SLIC superpixels (Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", PAMI 2012) as
tensor operators: on any device, for a batch, and in exported graphs.

Shape letters: B images, (H, W) grid of cells, N = H*W cells, K channels, M superpixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def superpixels(
    maps: Tensor, spacing: int, compactness: float, valid: Tensor | None = None, iterations: int = 5
) -> Tensor:
    """Labels ``(B, N)`` int64 of the cells: k-means on colour and place, from a square grid of centres.

    Distances are ``|c_i - c_k|^2 + compactness^2 |p_i - p_k|^2 / spacing^2``; a cell chooses among the centres of its
    own square of the initial grid and the eight around it. Superpixels need not be connected.

    Args:
        maps: ``(B, K, H, W)``, colours.
        spacing: side of the initial squares, in cells.
        compactness: weight of place against colour.
        valid: ``(B, N)`` bool, cells that move centres; None for all.
    """
    batch, height, width = len(maps), maps.shape[2], maps.shape[3]
    down, across = (height + spacing - 1) // spacing, (width + spacing - 1) // spacing
    rows, columns = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    places = torch.stack([rows[:, None].expand(height, width), columns[None, :].expand(height, width)])
    places = (compactness / spacing * places.to(maps.dtype)).expand(batch, -1, -1, -1)
    weights = maps.new_ones(batch, 1, height, width)
    if valid is not None:
        weights = weights * valid.unflatten(1, (height, width))[:, None]
    # The cells of a square lie side by side, (B, K + 2, M squares, spacing^2): all of them compare with the same nine
    # centres, so that no centre is gathered for a cell.
    cells = _by_square(torch.cat([maps, places], dim=1), spacing, down, across)
    weights = _by_square(weights, spacing, down, across)
    own = torch.arange(down * across, device=maps.device)[:, None]
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    labels = own.expand(batch, -1, spacing**2)
    centres = cells.new_zeros(batch, cells.shape[1], down * across)
    for step in range(iterations):
        index = labels.flatten(1)[:, None]
        weighted = (weights * cells).flatten(2)
        sums = torch.zeros_like(centres).scatter_add(2, index.expand(-1, cells.shape[1], -1), weighted)
        counts = torch.zeros_like(centres[:, :1]).scatter_add(2, index, weights.flatten(2))
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        if step == 0:  # squares of padding have no centre
            centres = torch.where(counts > 0, centres, torch.inf)
        grid = F.pad(centres.unflatten(2, (down, across)), [1] * 4, value=torch.inf)
        distances = [
            (cells - grid[:, :, 1 + dy : 1 + dy + down, 1 + dx : 1 + dx + across].flatten(2)[..., None])
            .square()
            .sum(dim=1)
            for dy, dx in shifts
        ]
        best = torch.stack(distances).argmin(dim=0)  # (B, M, spacing^2), an index of shifts
        row, column = torch.div(best, 3, rounding_mode="floor") - 1, best % 3 - 1
        # An image that is all padding has no centre: the first shift would leave the grid.
        labels = (own + row * across + column).clamp(min=0)
    found = labels.unflatten(2, (spacing, spacing)).unflatten(1, (down, across)).transpose(2, 3)
    return found.reshape(batch, down * spacing, across * spacing)[:, :height, :width].flatten(1)


def _by_square(maps: Tensor, spacing: int, down: int, across: int) -> Tensor:
    """``(B, K, H, W)`` to ``(B, K, M, spacing^2)``: the cells of each square of a grid, beyond the border zeros."""
    padding = (0, across * spacing - maps.shape[3], 0, down * spacing - maps.shape[2])
    squares = F.pad(maps, padding).unflatten(3, (across, spacing)).unflatten(2, (down, spacing))
    return squares.transpose(3, 4).flatten(4).flatten(2, 3)


def patch_superpixels(
    images: Tensor, patch_size: int, size: int, compactness: float, valid: Tensor | None = None
) -> Tensor:
    """Superpixel ``(B, n)`` of each patch: that of its central cell.

    Args:
        images: ``(B, 3, height, width)``, normalised; sides are multiples of the patch size.
        patch_size: in pixels.
        size: side of a superpixel, in patches.
        compactness: see :func:`superpixels`; a difference in colour of one standard deviation weighs 1.
        valid: ``(B, n)`` bool, patches that are not padding; None for all.
    """
    # Cells of a quarter of a patch, or the next larger size that divides it.
    cell = next(side for side in range(max(1, patch_size // 4), patch_size + 1) if patch_size % side == 0)
    per_patch = patch_size // cell
    maps = F.avg_pool2d(images.to(torch.promote_types(images.dtype, torch.float32)), cell)
    grid = (maps.shape[2] // per_patch, maps.shape[3] // per_patch)
    if valid is not None:
        fine = valid.unflatten(1, grid).repeat_interleave(per_patch, dim=1).repeat_interleave(per_patch, dim=2)
        valid = fine.flatten(1)
    labels = superpixels(maps, size * per_patch, compactness, valid).unflatten(1, (maps.shape[2], maps.shape[3]))
    return labels[:, per_patch // 2 :: per_patch, per_patch // 2 :: per_patch].flatten(1)
