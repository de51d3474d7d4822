"""NACLIP: patches attend to their neighbours (Hajimiri, Ben Ayed, Dolz, "Pay Attention to Your Neighbours", WACV 2025).

Shape letters: (h, w) patch grid, n = h*w patches, p class tokens, T = p + n.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput
from reclip_d2.backbones.dense_attention.softmax import SoftmaxAttention, attend_to_block


@DENSE_ATTENTION_REGISTRY.register()
class NACLIPAttention(SoftmaxAttention):
    """``A = softmax(k k^T / sqrt(d) + w)`` with a Gaussian ``w_ij = exp(-|p_i - p_j|^2 / (2 sigma^2))`` of the distance
    between two patches, 0 for class tokens; without residual connections and MLP."""

    name = "naclip"
    options = {"residual": "MODEL.CLIP.ATTENTION_RESIDUAL", "sigma": "MODEL.CLIP.NACLIP_SIGMA"}

    def __init__(self, residual: str = "paper", sigma: float = 5.0) -> None:
        """
        Args:
            residual: see :class:`SoftmaxAttention`.
            sigma: standard deviation of the Gaussian, in patches.
        """
        super().__init__(residual)
        self.sigma = sigma

    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        return inputs.block.merge_heads(self.mixed_heads(inputs))

    def mixed_heads(self, inputs: AttentionInput) -> Tensor:
        """``A v`` of the patches, by head: ``(B, heads, n, E / heads)``."""
        block, normed = inputs.block, inputs.block.norm(inputs.tokens)
        keys = block.split_heads(block.keys(normed))
        values = block.split_heads(block.values(normed))
        bias = gaussian_bias(inputs.grid, self.sigma, inputs.class_tokens, keys)
        return attend_to_block(inputs, keys[:, :, inputs.class_tokens :], keys, values, bias)


def gaussian_bias(grid: tuple[int, int], sigma: float, class_tokens: int, like: Tensor) -> Callable[[slice], Tensor]:
    """Rows ``(rows, T)`` of ``w``, by the slice of their patches; dtype and device of ``like``.

    ``w`` is a product of a Gaussian of rows and one of columns, so that a grid needs only h*h + w*w exponentials.
    """
    height, width = grid

    def along(side: int) -> Tensor:
        # In float32 or wider: low precision has no exact position.
        positions = torch.arange(side, device=like.device).to(torch.promote_types(like.dtype, torch.float32))
        return torch.exp(-(positions[:, None] - positions).square() / (2 * sigma**2)).to(like.dtype)

    by_row, by_column = along(height), along(width)
    patches = torch.arange(height * width, device=like.device)

    def rows_of(rows: slice) -> Tensor:
        indices = patches[rows]
        vertical = by_row[torch.div(indices, width, rounding_mode="floor")]
        bias = vertical[:, :, None] * by_column[indices % width][:, None, :]
        return F.pad(bias.flatten(1), [class_tokens, 0])

    return rows_of
