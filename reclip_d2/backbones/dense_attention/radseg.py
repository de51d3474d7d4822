"""RADSeg's two steps (Alama et al., "RADSeg: Unleashing Parameter and Compute Efficient Zero-Shot Open-Vocabulary
Segmentation Using Agglomerative Models", 2025), on any CLIP.

Shape letters: B images, G heads, n patches, T tokens, E width of the transformer, D width of the joint embedding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput
from reclip_d2.backbones.dense_attention.rows import attend, mean_similarity, mix, softmax_of_positive
from reclip_d2.backbones.dense_attention.softmax import SoftmaxAttention, valid_tokens


@DENSE_ATTENTION_REGISTRY.register()
class RADSegAttention(SoftmaxAttention):
    """Self-correlating recursive attention (SCRA), then self-correlating global aggregation (SCGA).

    SCRA: ``O = output(softmax(q k^T / sqrt(d)) v)`` is the block's own attention; then ``A = softmax(s cos(O, O))`` for
    each head, over the tokens of cosine >= 0. Residual connections and MLP are kept.

    SCGA, on the projected features f (RADSeg: RADIO's, before they are aligned with the language model):
    ``softmax(s (S - mean S)) f`` with ``S = cos(f, f)``, over the patches with S of at least its mean.

    Soft-max and mean are over all pairs of patches of an image.
    """

    name = "radseg"
    takes_feedback = False
    paper_residual = True
    options = {
        "residual": "MODEL.CLIP.ATTENTION_RESIDUAL",
        "attention_scale": "MODEL.CLIP.RADSEG_ATTENTION_SCALE",
        "feature_scale": "MODEL.CLIP.RADSEG_FEATURE_SCALE",
    }

    def __init__(self, residual: str = "paper", attention_scale: float = 10.0, feature_scale: float = 10.0) -> None:
        """
        Args:
            residual: see :class:`SoftmaxAttention`.
            attention_scale: s of SCRA; 0 for the block's own attention.
            feature_scale: s of SCGA; 0 for none.
        """
        super().__init__(residual)
        self.attention_scale = attention_scale
        self.feature_scale = feature_scale

    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        block, normed = inputs.block, inputs.block.norm(inputs.tokens)
        queries, keys, values = (
            block.split_heads(project(normed)) for project in (block.queries, block.keys, block.values)
        )
        valid = valid_tokens(inputs)
        first = attend(queries, keys, values, valid)
        if not self.attention_scale:
            return block.merge_heads(first)[:, inputs.class_tokens :]
        own = block.split_heads(block.output(block.merge_heads(first)))
        heads = F.normalize(own, dim=-1).flatten(0, 1)  # (B * G, T, E / G)
        if valid is not None:
            valid = valid.repeat_interleave(block.num_heads, dim=0)
        mixed = mix(
            heads[:, inputs.class_tokens :],
            heads,
            values.flatten(0, 1),
            lambda scores, rows: softmax_of_positive(self.attention_scale * scores, valid),
        )
        return block.merge_heads(mixed.unflatten(0, (len(inputs.tokens), block.num_heads)))

    def refine(self, features: Tensor, inputs: AttentionInput) -> Tensor:
        """SCGA of the features ``(B, n, D)``."""
        if not self.feature_scale:
            return features
        unit = F.normalize(features, dim=-1)
        mean = mean_similarity(unit, inputs.valid)
        return mix(
            unit,
            unit,
            features,
            lambda scores, rows: softmax_of_positive(self.feature_scale * (scores - mean), inputs.valid),
        )
