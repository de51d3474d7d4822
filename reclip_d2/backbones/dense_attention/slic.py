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
    device = maps.device
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    down, across = (height + spacing - 1) // spacing, (width + spacing - 1) // spacing
    square_y = torch.div(rows, spacing, rounding_mode="floor")[:, None].expand(height, width).reshape(-1)
    square_x = torch.div(columns, spacing, rounding_mode="floor")[None, :].expand(height, width).reshape(-1)
    places = torch.stack(
        [rows[:, None].expand(height, width).reshape(-1), columns[None, :].expand(height, width).reshape(-1)], dim=-1
    ).to(maps.dtype)
    cells = torch.cat(
        [maps.flatten(2).transpose(1, 2), (compactness / spacing * places).expand(batch, -1, -1)], dim=-1
    )  # (B, N, K + 2)
    weights = torch.ones_like(cells[..., :1]) if valid is None else valid[..., None].to(cells.dtype)
    labels = (square_y * across + square_x).expand(batch, -1)
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    choices, beyond = [], []
    for dy, dx in shifts:
        y, x = square_y + dy, square_x + dx
        beyond.append((y < 0) | (y >= down) | (x < 0) | (x >= across))
        choices.append(torch.where(beyond[-1], 0, y * across + x))
    candidates, forbidden = torch.stack(choices), torch.stack(beyond)  # (9, N)
    centres = torch.zeros_like(cells[:, :1]).expand(-1, down * across, -1)
    for step in range(iterations):
        index = labels[..., None]
        sums = torch.zeros_like(centres).scatter_add(1, index.expand(-1, -1, cells.shape[-1]), weights * cells)
        counts = torch.zeros_like(centres[..., :1]).scatter_add(1, index, weights)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        if step == 0:  # squares of padding have no centre
            never = (counts == 0)[..., 0]
        distances = [
            (cells - centres[:, choice]).square().sum(dim=-1).masked_fill(outside | never[:, choice], torch.inf)
            for choice, outside in zip(candidates, forbidden, strict=True)
        ]
        best = torch.stack(distances).argmin(dim=0)  # (B, N)
        labels = candidates.expand(batch, -1, -1).gather(1, best[:, None]).squeeze(1)
    return labels


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
