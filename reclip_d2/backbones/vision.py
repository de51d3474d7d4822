"""Dense image features of an open_clip Vision Transformer, from pixels to Z.

:func:`dense_image_features` runs :func:`embed_patches`, all blocks but the last, a dense attention in place of the
last, and :func:`project_dense`.

Shape letters: B images, (H, W) image size in pixels, (h, w) patch grid, n = h*w patches, E width of the
transformer, D width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock as UsualBlock
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import AttentionInput, DenseAttention, EarlierBlocks, TransformerBlock
from reclip_d2.backbones.interface import valid_patches
from reclip_d2.backbones.positions import positions_on_grid
from reclip_d2.backbones.timm_vit import unsupported_part
from reclip_d2.errors import ReclipError
from reclip_d2.layers import autocast_copy, frozen_linear
from reclip_d2.layers.frozen_weights import is_frozen_on_gpu


def check_image_tower(visual: nn.Module, name: str) -> None:
    """Raise :class:`ReclipError` unless ``visual`` is a ViT whose last block a dense attention can replace.

    One of open_clip needs a patch convolution, a class token, an ``nn.MultiheadAttention`` with a packed input
    projection in each block, and a final projection; those of timm are checked by
    :func:`~reclip_d2.backbones.timm_vit.unsupported_part`.
    """
    if hasattr(visual, "trunk"):
        reason = unsupported_part(visual)
        if reason:
            raise ReclipError(f"MODEL.CLIP.NAME {name!r} is not supported: {reason}; docs/backbones.md lists models")
        return
    reason = None
    if not all(hasattr(visual, part) for part in ("conv1", "class_embedding", "transformer", "ln_post", "proj")):
        reason = "its image tower is not an open_clip Vision Transformer"
    elif getattr(visual, "attn_pool_contrastive", None) is not None:
        reason = "its image tower pools by attention twice"
    elif not isinstance(getattr(visual.transformer.resblocks[-1], "attn", None), nn.MultiheadAttention):
        reason = "the blocks of its image tower are not the usual ones"
    elif visual.transformer.resblocks[-1].attn.in_proj_weight is None:
        reason = "its attention has no packed query-key-value projection"
    if reason:
        raise ReclipError(f"MODEL.CLIP.NAME {name!r} is not supported: {reason}; use a ViT such as ViT-B-16-quickgelu")


def embed_patches(visual: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens that enter the transformer.

    Args:
        visual: open_clip ``VisionTransformer``.
        images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.

    Returns:
        ``(B, 1 + n, E)`` tokens, the class token first, after ``ln_pre``, and the grid (h, w).
    """
    patches, size = _project_patches(visual.conv1, images)
    token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
    tokens = torch.cat([token, patches], dim=1) + positions_on_grid(visual, size, patches.dtype)
    return visual.ln_pre(visual.patch_dropout(tokens)), size


def _project_patches(conv: nn.Conv2d, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The patch convolution: ``(B, n, E)`` and the grid (h, w). With a frozen weight on a GPU it is one product, in the
    layout of the tokens."""
    height, width = conv.kernel_size
    plain = (conv.stride, conv.padding, conv.dilation, conv.groups) == (conv.kernel_size, (0, 0), (1, 1), 1)
    if plain and is_frozen_on_gpu(images, conv.weight, conv.bias):
        size = (images.shape[-2] // height, images.shape[-1] // width)
        pixels = images[..., : size[0] * height, : size[1] * width]
        pixels = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        weight = autocast_copy(conv.weight).flatten(1)
        return F.linear(pixels.to(weight.dtype).flatten(3).flatten(1, 2), weight, autocast_copy(conv.bias)), size
    patches = conv(images)
    return patches.flatten(2).transpose(1, 2), (patches.shape[-2], patches.shape[-1])


class OpenClipBlock(TransformerBlock):
    """The parts of an open_clip ``ResidualAttentionBlock``."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.num_heads = block.attn.num_heads

    def _project(self, normed: Tensor, part: int) -> Tensor:
        """Queries, keys or values (part 0, 1 or 2) by their rows of the packed projection."""
        attention = self.block.attn
        rows = slice(part * attention.embed_dim, (part + 1) * attention.embed_dim)
        bias = attention.in_proj_bias
        weight, bias = autocast_copy(attention.in_proj_weight), autocast_copy(bias)
        return frozen_linear(normed, weight[rows], None if bias is None else bias[rows])

    def norm(self, tokens: Tensor) -> Tensor:
        return self.block.ln_1(tokens)

    def queries(self, normed: Tensor) -> Tensor:
        return self._project(normed, 0)

    def keys(self, normed: Tensor) -> Tensor:
        return self._project(normed, 1)

    def values(self, normed: Tensor) -> Tensor:
        return self._project(normed, 2)

    def output(self, mixed: Tensor) -> Tensor:
        output = self.block.attn.out_proj
        return self.block.ls_1(F.linear(mixed, autocast_copy(output.weight), autocast_copy(output.bias)))

    def mlp(self, tokens: Tensor) -> Tensor:
        return self.block.ls_2(self.block.mlp(self.block.ln_2(tokens)))


def last_block_input(
    visual: nn.Module,
    images: Tensor,
    earlier_blocks: Sequence[int] = (),
    image_sizes: Sequence[tuple[int, int]] | None = None,
    attention: DenseAttention | None = None,
) -> AttentionInput:
    """Run all blocks but the last.

    Args:
        images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.
        earlier_blocks: indices of the blocks whose inputs are returned too.
        image_sizes: (H, W) of each image without padding; None if none is padded.
        attention: may run these blocks itself, if no image is padded.
    """
    tokens, grid = embed_patches(visual, images)
    *blocks, last = visual.transformer.resblocks
    valid = None
    if image_sizes is not None and any(tuple(size) != tuple(images.shape[-2:]) for size in image_sizes):
        valid = valid_patches(image_sizes, grid, visual.patch_size[0], images.device)
    run = EarlierBlocks(earlier_blocks, attention if valid is None else None)
    for index, block in enumerate(blocks):
        tokens = run(index, OpenClipBlock(block), tokens, block)
    return AttentionInput(
        images,
        OpenClipBlock(last),
        tokens,
        grid,
        valid=valid,
        earlier=run.inputs,
        kept=run.kept,
        count=len(blocks) + 1,
        is_pooled=visual.attn_pool is not None,
    )


def project_dense(visual: nn.Module, attention: DenseAttention, inputs: AttentionInput) -> Tensor:
    """Image features Z: dense attention, value path of an attentional pooling (CoCa), ``ln_post``, projection to the
    joint space, L2 norm of each patch.

    Returns:
        ``(B, n', D)`` float32 (float64 for a float64 model), rows of length 1, for the attention's n' output patches.
    """
    features = attention(inputs)
    if visual.attn_pool is not None:
        features = attentional_pooler_values(visual.attn_pool, features)
    features = visual.ln_post(features)
    if visual.proj is not None:
        features = features @ autocast_copy(visual.proj)
    features = attention.refine(features, inputs)
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def attentional_pooler_values(pooler: nn.Module, patches: Tensor) -> Tensor:
    """Value path of open_clip's ``AttentionalPooler``: ``W_o (W_v ln_k(x_i) + b_v) + b_o``, what it would return if all
    attention were on patch i. As MaskCLIP for CLIP's last block, where a ViT without attentional pooling pools.

    Args:
        patches: x ``(B, n, E)``, after the last block.

    Returns:
        ``(B, n, D)``.
    """
    attention = pooler.attn
    width = attention.embed_dim
    weight = attention.v_proj_weight if attention.in_proj_weight is None else attention.in_proj_weight[2 * width :]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    values = frozen_linear(pooler.ln_k(patches), weight, bias)
    return F.linear(values, autocast_copy(attention.out_proj.weight), autocast_copy(attention.out_proj.bias))


def dense_image_features(
    visual: nn.Module,
    images: Tensor,
    attention: DenseAttention,
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, AttentionInput]:
    """Image features Z ``(B, n', D)`` of section III-A, and the last block's input that they were computed from:
    :func:`last_block_input`, then :func:`project_dense`."""
    earlier_blocks = attention.earlier_blocks(len(visual.transformer.resblocks))
    inputs = last_block_input(visual, images, earlier_blocks, image_sizes, attention)
    return project_dense(visual, attention, inputs), inputs


def global_image_features(visual: nn.Module, images: Tensor) -> Tensor | None:
    """Global image features ``(B, D)``, not normalised: open_clip's, but the last block computes the class token only.

    Args:
        images: ``(B, 3, H, W)`` of the size that the tower was trained at, normalised.

    Returns:
        None for a tower whose global feature is not its class token, or with other blocks than the usual ones.
    """
    *blocks, last = visual.transformer.resblocks
    if getattr(visual, "pool_type", "") != "tok" or visual.attn_pool is not None or type(last) is not UsualBlock:
        return None
    tokens, _ = embed_patches(visual, images)
    for other in blocks:
        tokens = other(tokens)
    block = OpenClipBlock(last)
    normed = block.norm(tokens)
    parts = block.queries(normed[:, :1]), block.keys(normed), block.values(normed)
    heads = [part.unflatten(2, (block.num_heads, -1)).transpose(1, 2) for part in parts]
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    token = tokens[:, :1] + block.output(mixed)
    pooled = visual.ln_post((token + block.mlp(token))[:, 0])
    return pooled if visual.proj is None else pooled @ autocast_copy(visual.proj)
