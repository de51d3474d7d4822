"""Positional input of Eq. (2) for image towers without a learned positional embedding (not in the papers).

Shape letters: (h, w) patch grid, E width of the image transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.backbones.positions import patch_numbers

GRID = 16
"""Side of the grid, in patches, in whose units positions are measured on all grids: 224 pixels in patches of 14."""
TEMPERATURE = 10_000.0
ROOT_MEAN_SQUARE = 0.1
"""Over all channels. About that of a learned embedding: 0.13 in the two CLIPs that ship with the package."""


def sine_positions(width: int, grid: tuple[int, int], like: Tensor) -> Tensor:
    """Sines and cosines of the patches' positions, as in Transformers, by axis.

    With F = E // 4 frequencies ``w_k = 10000^(-k / F)`` and centres ``y_i = 16 (i + 1/2) / h``,
    ``x_j = 16 (j + 1/2) / w``, channels are 0.1 sqrt(2) times ``sin(w_k y_i)``, ``cos(w_k y_i)``, ``sin(w_k x_j)``,
    ``cos(w_k x_j)``, each for k = 0 ... F - 1. Positions are relative to the image, as those of a learned embedding
    that is resized to the grid. Can be traced for any grid.

    Args:
        width: E, a multiple of 4.
        grid: (h, w).
        like: a tensor on the device.

    Returns:
        ``(E, h, w)`` float32.
    """
    count = width // 4
    frequencies = TEMPERATURE ** (-torch.arange(count, device=like.device, dtype=torch.float32) / count)
    patches = F.interpolate(torch.ones(1, 1, 1, 1, device=like.device), size=tuple(grid), mode="nearest")[0, 0]
    numbers = zip(patch_numbers(patches), grid, strict=True)
    rows, columns = (frequencies[:, None, None] * (GRID * (number + 0.5) / side) for number, side in numbers)
    amplitude = ROOT_MEAN_SQUARE * 2**0.5
    return amplitude * torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])
