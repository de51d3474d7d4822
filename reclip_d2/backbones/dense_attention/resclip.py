"""ResCLIP: attention of middle blocks helps the last (Yang et al., "ResCLIP: Residual Attention for Training-free Dense
Vision-language Inference", CVPR 2025).

Only its first module, residual cross-correlation self-attention (RCS), is here. The second, semantic feedback
refinement (SFR), needs predicted labels: it is a refinement of predictions, ``TEST.REFINE sfr``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput, BlockInput
from reclip_d2.backbones.dense_attention.naclip import NACLIPAttention
from reclip_d2.backbones.dense_attention.rows import attend, attend_and_add, fits
from reclip_d2.backbones.dense_attention.softmax import valid_tokens
from reclip_d2.errors import ReclipError


@DENSE_ATTENTION_REGISTRY.register()
class ResCLIPAttention(NACLIPAttention):
    """``A = (1 - weight) A_s + weight A_c``: A_s is NACLIP's, A_c the mean over some middle blocks of their attention
    ``softmax(q k^T / sqrt(d))``, head by head. (Its public code also doubles A.)

    ``A_c v`` is the mean of each middle block's attention to the last block's values. On a CPU the middle blocks add
    their attentions up while the tower runs them, if the sum is within the limit of scores; otherwise, and where
    attention without a matrix is faster, they are computed a second time, and no matrix is stored.
    """

    name = "resclip"
    options = {
        "residual": "MODEL.CLIP.ATTENTION_RESIDUAL",
        "sigma": "MODEL.CLIP.NACLIP_SIGMA",
        "weight": "MODEL.CLIP.RESCLIP_WEIGHT",
        "blocks": "MODEL.CLIP.RESCLIP_BLOCKS",
    }

    def __init__(
        self, residual: str = "paper", sigma: float = 5.0, weight: float = 0.3, blocks: Sequence[int] = ()
    ) -> None:
        """
        Args:
            residual: see :class:`SoftmaxAttention`.
            sigma: see :class:`NACLIPAttention`.
            weight: lambda of the paper, from 0 to 1.
            blocks: first and last of the middle blocks, from 0, or one block; empty for 5 and 8 of 12, and the same
                fractions of other depths.
        """
        super().__init__(residual, sigma)
        self.weight = weight
        self.blocks = list(blocks)

    def earlier_blocks(self, count: int) -> Sequence[int]:
        if not self.blocks:
            last = min(max(round(count * 9 / 12) - 1, 0), count - 2)
            return range(min(round(count * 5 / 12), last), last + 1)
        first, last = self.blocks[0], self.blocks[-1]
        if not 0 <= first <= last <= count - 2:
            raise ReclipError(
                f"MODEL.CLIP.RESCLIP_BLOCKS is {self.blocks}: give the first and the last of the blocks 0 to"
                f" {count - 2}"
            )
        return range(first, last + 1)

    def run_earlier(self, earlier: BlockInput, class_tokens: int, kept: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The block with an attention whose matrix ``(B, G, n, T)`` is added to those before."""
        block, tokens = earlier.block, earlier.tokens
        batch, count, _ = tokens.shape
        if not _is_plain_on_cpu(tokens) or not fits(batch * block.num_heads * count**2):
            return None
        normed = block.norm(tokens)
        parts = (block.split_heads(project(normed)) for project in (block.queries, block.keys, block.values))
        if kept is None:
            kept = tokens.new_zeros(batch, block.num_heads, count - class_tokens, count)
        tokens = tokens + block.output(block.merge_heads(attend_and_add(*parts, kept, class_tokens)))
        return tokens + block.mlp(tokens), kept

    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        block = inputs.block
        values = block.split_heads(block.values(block.norm(inputs.tokens)))
        crossed = (_crossed(inputs, values) if inputs.kept is None else inputs.kept @ values) / len(inputs.earlier)
        return block.merge_heads((1 - self.weight) * self.mixed_heads(inputs) + self.weight * crossed)


def _crossed(inputs: AttentionInput, values: Tensor) -> Tensor:
    """Sum of the middle blocks' attentions to the values ``(B, G, T, d)``: ``(B, G, n, d)``."""
    valid, crossed = valid_tokens(inputs), 0
    for earlier in inputs.earlier.values():
        normed = earlier.block.norm(earlier.tokens)
        queries = earlier.block.split_heads(earlier.block.queries(normed[:, inputs.class_tokens :]))
        keys = earlier.block.split_heads(earlier.block.keys(normed))
        crossed = crossed + attend(queries, keys, values, valid)
    return crossed


def _is_plain_on_cpu(tokens: Tensor) -> bool:
    """Whether this is plain inference on a CPU: no gradients, no lower precision, no trace."""
    special = torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    return tokens.device.type == "cpu" and not special and not torch.is_autocast_enabled("cpu")
