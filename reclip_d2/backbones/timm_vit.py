"""The parts of timm's Vision Transformers: of their blocks and of their attention pooling.

Shape letters: B images, n patches, T tokens, patches last, E width of the transformer, d width of a head.
"""

from __future__ import annotations

import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    HybridEmbed,
    PatchEmbed,
    RotaryEmbeddingCat,
    apply_rot_embed_cat,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import TransformerBlock
from reclip_d2.layers import autocast_copy, frozen_linear


def unsupported_part(visual: nn.Module) -> str | None:
    """Why dense features cannot be computed with open_clip's ``TimmModel``; None if they can.

    It needs timm's ``VisionTransformer`` or ``Eva`` with usual blocks, and a head that is applied to one vector.
    """
    trunk = visual.trunk
    kind = type(trunk).__name__
    if not isinstance(trunk, VisionTransformer | Eva):
        return f"its image tower is timm's {kind}, not a Vision Transformer"
    if not isinstance(trunk.patch_embed, PatchEmbed | HybridEmbed):
        return f"its patches come from timm's {type(trunk.patch_embed).__name__}"
    for block in trunk.blocks:
        attention = getattr(block, "attn", None)
        usual = type(block) in (Block, EvaBlock, EvaBlockPostNorm)
        if not usual or type(attention) not in (Attention, EvaAttention, AttentionRope):
            return f"the blocks of its {kind} are not the usual ones"
        if attention.gate is not None or getattr(attention, "num_kv_groups", 1) != 1:
            return f"the attention of its {kind} has gates or shared keys"
    rope = getattr(trunk, "rope", None)
    if rope is not None and not (type(rope) is RotaryEmbeddingCat and rope.grid_type == "index"):
        return f"its rotary embedding is an unusual {type(rope).__name__} of timm"
    pool = trunk.attn_pool
    if pool is None and trunk.global_pool not in ("token", "avg"):
        return f"its image tower pools by {trunk.global_pool or 'nothing'!r}"
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        return "its attention pooling has positions"
    if "pool" in visual.head._modules:
        return "its head pools by attention"
    return None


class TimmBlock(TransformerBlock):
    """The parts of timm's ``Block``, ``EvaBlock`` and ``EvaBlockPostNorm``.

    A block with norms after its branches fits in, too: :meth:`norm` then does nothing, and :meth:`output` and
    :meth:`mlp` end with the norms.
    """

    def __init__(self, block: nn.Module, rotary: Tensor | None = None) -> None:
        """
        Args:
            rotary: ``(n, 2 d)``, from :func:`~reclip_d2.backbones.timm_tokens.rotary_embedding`; None if the model has
                none.
        """
        self.block = block
        self.rotary = rotary
        self.num_heads = block.attn.num_heads
        self.norm_after = isinstance(block, EvaBlockPostNorm)

    def __call__(self, tokens: Tensor) -> Tensor:
        """timm's own forward pass ``(B, T, E)``."""
        return self.block(tokens) if self.rotary is None else self.block(tokens, rope=self.rotary)

    def _project(self, normed: Tensor, part: int) -> Tensor:
        """Queries, keys or values (part 0, 1 or 2)."""
        attention = self.block.attn
        if attention.qkv is None:
            layer = (attention.q_proj, attention.k_proj, attention.v_proj)[part]
            return frozen_linear(normed, layer.weight, layer.bias)
        size = attention.qkv.out_features // 3
        rows = slice(part * size, (part + 1) * size)
        bias = None if attention.qkv.bias is None else autocast_copy(attention.qkv.bias)[rows]
        if getattr(attention, "q_bias", None) is not None:  # EVA's keys have none
            bias = autocast_copy((attention.q_bias, None, attention.v_bias)[part])
        return frozen_linear(normed, autocast_copy(attention.qkv.weight)[rows], bias)

    def _place(self, packed: Tensor, norm: nn.Module) -> Tensor:
        """Norm of each head, and rotation of the patches, which come last."""
        heads = norm(self.split_heads(packed))
        if self.rotary is not None:
            first = heads.shape[2] - self.rotary.shape[0]
            half = getattr(self.block.attn, "rotate_half", False)
            turned = apply_rot_embed_cat(heads[:, :, first:], self.rotary, half=half)
            heads = torch.cat([heads[:, :, :first], turned.to(heads.dtype)], dim=2)
        return self.merge_heads(heads)

    def norm(self, tokens: Tensor) -> Tensor:
        return tokens if self.norm_after else self.block.norm1(tokens)

    def queries(self, normed: Tensor) -> Tensor:
        return self._place(self._project(normed, 0), self.block.attn.q_norm)

    def keys(self, normed: Tensor) -> Tensor:
        return self._place(self._project(normed, 1), self.block.attn.k_norm)

    def values(self, normed: Tensor) -> Tensor:
        return self._project(normed, 2)

    def output(self, mixed: Tensor) -> Tensor:
        attention = self.block.attn
        return self._branch(attention.proj(attention.norm(mixed)), 1)

    def mlp(self, tokens: Tensor) -> Tensor:
        return self._branch(self.block.mlp(tokens if self.norm_after else self.block.norm2(tokens)), 2)

    def _branch(self, x: Tensor, number: int) -> Tensor:
        """What follows a branch: its norm or its layer scale."""
        block = self.block
        if self.norm_after:
            return getattr(block, f"norm{number}")(x)
        if isinstance(block, Block):
            return getattr(block, f"ls{number}")(x)
        gamma = getattr(block, f"gamma_{number}")
        return x if gamma is None else gamma * x


def attention_pool_values(pool: nn.Module, patches: Tensor) -> Tensor:
    """Value path of timm's ``AttentionPoolLatent`` (SigLIP): with ``y_i = W_o (W_v x_i + b_v) + b_o``,
    ``y_i + MLP(norm(y_i))``, what it would return if all attention were on patch i.

    As MaskCLIP for CLIP's last block, where a ViT without attention pooling pools its patches.

    Args:
        patches: x ``(B, n, E)``, after the last block and the final norm.

    Returns:
        ``(B, n, E)``.
    """
    size = pool.kv.out_features // 2
    bias = None if pool.kv.bias is None else autocast_copy(pool.kv.bias)[size:]
    pooled = pool.proj(frozen_linear(patches, autocast_copy(pool.kv.weight)[size:], bias))
    return pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))
