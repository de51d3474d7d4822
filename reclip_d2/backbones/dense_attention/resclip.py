"""ResCLIP: attention of middle blocks helps the last (Yang et al., "ResCLIP: Residual Attention for Training-free Dense
Vision-language Inference", CVPR 2025).

Only its first module, residual cross-correlation self-attention (RCS), is here. The second, semantic feedback
refinement (SFR), needs predicted labels: it is a refinement of predictions, ``TEST.REFINE sfr``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput
from reclip_d2.backbones.dense_attention.naclip import NACLIPAttention
from reclip_d2.backbones.dense_attention.rows import attend
from reclip_d2.backbones.dense_attention.softmax import valid_tokens
from reclip_d2.errors import ReclipError


@DENSE_ATTENTION_REGISTRY.register()
class ResCLIPAttention(NACLIPAttention):
    """``A = (1 - weight) A_s + weight A_c``: A_s is NACLIP's, A_c the mean over some middle blocks of their attention
    ``softmax(q k^T / sqrt(d))``, head by head. (Its public code also doubles A.)

    ``A_c v`` is the mean of each middle block's attention to the last block's values, so that no matrix is stored.
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

    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        block = inputs.block
        values = block.split_heads(block.values(block.norm(inputs.tokens)))
        valid = valid_tokens(inputs)
        crossed = 0
        for earlier in inputs.earlier.values():
            normed = earlier.block.norm(earlier.tokens)
            queries = earlier.block.split_heads(earlier.block.queries(normed[:, inputs.class_tokens :]))
            keys = earlier.block.split_heads(earlier.block.keys(normed))
            crossed = crossed + attend(queries, keys, values, valid)
        crossed = crossed / len(inputs.earlier)
        return block.merge_heads((1 - self.weight) * self.mixed_heads(inputs) + self.weight * crossed)
