"""SCLIP: correlative self-attention (Wang, Mei, Yuille, "SCLIP: Rethinking Self-Attention for Dense Vision-Language
Inference", ECCV 2024, Eq. 3)."""

from __future__ import annotations

from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput
from reclip_d2.backbones.dense_attention.softmax import SoftmaxAttention, attend_to_block


@DENSE_ATTENTION_REGISTRY.register()
class SCLIPAttention(SoftmaxAttention):
    """``A = softmax(q q^T / sqrt(d)) + softmax(k k^T / sqrt(d))``; its code keeps residual connections and MLP."""

    name = "sclip"
    paper_residual = True

    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        block, normed = inputs.block, inputs.block.norm(inputs.tokens)
        values = block.split_heads(block.values(normed))
        mixed = 0
        for project in (block.queries, block.keys):
            part = block.split_heads(project(normed))
            mixed = mixed + attend_to_block(inputs, part[:, :, inputs.class_tokens :], part, values)
        return block.merge_heads(mixed)
