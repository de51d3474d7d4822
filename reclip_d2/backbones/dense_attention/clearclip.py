"""ClearCLIP (Lan et al., "ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference", ECCV
2024)."""

from __future__ import annotations

from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput
from reclip_d2.backbones.dense_attention.softmax import SoftmaxAttention, attend_to_block


@DENSE_ATTENTION_REGISTRY.register()
class ClearCLIPAttention(SoftmaxAttention):
    """``A = softmax(q q^T / sqrt(d))``, without residual connections and MLP."""

    name = "clearclip"

    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        block, normed = inputs.block, inputs.block.norm(inputs.tokens)
        queries = block.split_heads(block.queries(normed))
        values = block.split_heads(block.values(normed))
        return block.merge_heads(attend_to_block(inputs, queries[:, :, inputs.class_tokens :], queries, values))
