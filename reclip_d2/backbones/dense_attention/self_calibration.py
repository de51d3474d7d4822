"""Common part of SC-CLIP and DiH-CLIP: patches are mixed with similar ones, by the similarity of earlier features.

Shape letters: B images, n patches, E width of the transformer.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import AttentionInput, DenseAttention
from reclip_d2.backbones.dense_attention.rows import countable, mix

# Blocks of 12 whose outputs are used, from 0.
MIDDLE, SHALLOW, LEVELS = 8, 3, (3, 9)
# gamma: scale of the similarities in the attention, as in ProxyCLIP.
SCALE = 3.0


def scaled(block: int, count: int) -> int:
    """Index, out of ``count`` blocks, of the block at the place of ``block`` of 12; never the last."""
    return min(block * count // 12, count - 2)


class SelfCalibratedAttention(DenseAttention):
    """With x the last block's input patches, S = cos(m, m) of middle features m, S' = cos(f, f) of shallow features f,
    and N(S) = S where it is at least ``threshold``, else 0, divided by its row's sum::

        y = N(S') (attention(N(S) x) + w c  +  attention(r) + w c_r)

    where r is the sum of the outputs of several blocks, and c and c_r are the class tokens of the last block's input
    and of the sum. Without residual connections and MLP. Blocks are given for 12, and scaled for other depths.

    Subclasses define the attention and m.
    """

    def __init__(self, threshold: float = 0.4, class_token: float = 0.3) -> None:
        """
        Args:
            threshold: beta of the papers' code.
            class_token: w.
        """
        super().__init__()
        self.threshold = threshold
        self.class_token = class_token

    def earlier_blocks(self, count: int) -> Sequence[int]:
        first, last = (scaled(block, count) for block in LEVELS)
        outputs = {scaled(MIDDLE, count), scaled(SHALLOW, count), *range(first, last + 1)}
        needed = {*(block + 1 for block in outputs), scaled(MIDDLE, count)}
        return sorted(needed & set(range(count - 1)))

    @abc.abstractmethod
    def calibrated(self, inputs: AttentionInput) -> tuple[Tensor, Tensor]:
        """Input patches x and middle features m, both ``(B, n, E)``."""

    @abc.abstractmethod
    def mixed_values(self, inputs: AttentionInput, patches: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
        """The attention's mixed values ``(B, n, E)``, before the output projection, for several inputs ``(B, n, E)``.

        Args:
            unit: m of length 1.
        """

    def forward(self, inputs: AttentionInput) -> Tensor:
        """Output patches ``(B, n, E)``."""
        patches, middle = self.calibrated(inputs)
        unit = F.normalize(middle, dim=-1)
        shallow = F.normalize(patches_of(block_output(inputs, scaled(SHALLOW, inputs.count)), inputs), dim=-1)
        first, last = (scaled(block, inputs.count) for block in LEVELS)
        levels = sum(block_output(inputs, block) for block in range(first, last + 1))
        tokens = [self.aggregate(unit, patches, inputs.valid), patches_of(levels, inputs)]
        mixed = sum(inputs.block.output(one) for one in self.mixed_values(inputs, tokens, unit))
        for source in (inputs.tokens, levels):
            if inputs.class_tokens:
                mixed = mixed + self.class_token * source[:, :1]
        return self.aggregate(shallow, mixed, inputs.valid)

    def aggregate(self, unit: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        """``N(S) values`` with ``S = unit unit^T``: ``(B, n, E)``."""
        valid = countable(valid)

        def weigh(scores: Tensor, rows: slice) -> Tensor:
            kept = scores >= self.threshold
            if valid is not None:
                kept = kept & valid[:, None, :]
            weights = scores.masked_fill(~kept, 0)
            return weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)

        return mix(unit, unit, values, weigh)


def block_output(inputs: AttentionInput, block: int) -> Tensor:
    """Output ``(B, T, E)`` of a block before the last, of index -1 or more: the input of the one after it."""
    return inputs.tokens if block + 1 == inputs.count - 1 else inputs.earlier[block + 1].tokens


def patches_of(tokens: Tensor, inputs: AttentionInput) -> Tensor:
    """The patches ``(B, n, E)`` of tokens ``(B, T, E)``."""
    return tokens[:, inputs.class_tokens :]


def neighbour_means(tokens: Tensor, replaced: Tensor, valid: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Patches ``(B, n, E)``, those that are ``replaced`` ``(B, n)`` as the mean of their neighbours (of eight) that are
    not; unchanged if there are none."""
    counted = ~replaced if valid is None else ~replaced & valid
    weights = counted[..., None].to(tokens.dtype)

    def around(x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, grid)
        # The patch itself is part of the window, with weight 0 where this matters.
        return 9 * F.avg_pool2d(maps, 3, stride=1, padding=1).flatten(2).transpose(1, 2)

    sums, counts = around(weights * tokens), around(weights)
    return torch.where(replaced[..., None] & (counts > 0.5), sums / counts.clamp(min=1), tokens)
