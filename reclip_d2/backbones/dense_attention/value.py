"""The value path of MaskCLIP, which ReCLIP and ReCLIP++ build on (section III-A)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput, DenseAttention
from reclip_d2.backbones.dense_attention.rows import attend
from reclip_d2.backbones.dense_attention.softmax import valid_tokens


@DENSE_ATTENTION_REGISTRY.register()
class ValueAttention(DenseAttention):
    """``out_proj(v_proj(ln_1(x)))``: the attention matrix is the identity, so that each patch keeps its own value.

    In a tower that pools its patches by attention, the pooling takes the last block's place: the tower computes the
    value path of the pooling, and the block stays as it is, except that patches do not attend to padding.

    Checkpoints do not record it by name, but only a ``MODEL.CLIP.VALUE_PATH_RESIDUAL`` that differs from the default,
    for compatibility with checkpoints from before there were other attentions.
    """

    name = "value"
    options = {"residual": "MODEL.CLIP.VALUE_PATH_RESIDUAL"}

    def __init__(self, residual: bool = True) -> None:
        """
        Args:
            residual: keep the block's residual connections and its MLP around the value path, as the public code of
                MaskCLIP and ReCLIP does; otherwise the attention's output alone.
        """
        super().__init__()
        self.residual = residual

    @property
    def uses_mlp(self) -> bool:
        return self.residual

    def forward(self, inputs: AttentionInput) -> Tensor:
        """Value path of the patches ``(B, n, E)``. They do not interact, so class tokens and padding do not matter."""
        if inputs.is_pooled:
            return self._whole_block(inputs)
        block, tokens = inputs.block, inputs.patches
        out = block.output(block.values(block.norm(tokens)))
        if not self.residual:
            return out
        out = tokens + out
        return out + block.mlp(out)

    def _whole_block(self, inputs: AttentionInput) -> Tensor:
        """The patches after the block, unchanged: ``(B, n, E)``."""
        block = inputs.block
        normed = block.norm(inputs.tokens)
        queries = block.split_heads(block.queries(normed)[:, inputs.class_tokens :])
        keys, values = (block.split_heads(part(normed)) for part in (block.keys, block.values))
        out = block.output(block.merge_heads(attend(queries, keys, values, valid_tokens(inputs))))
        out = inputs.patches + out
        return out + block.mlp(out)

    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in super().identity().items() if key in self.options.values()}
