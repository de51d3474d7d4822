"""Tokens of timm's Vision Transformers for images of any size, with their positions.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, n = h*w patches, p class and register tokens,
T = p + n tokens, E width of the transformer, d width of a head.
"""

from __future__ import annotations

import torch
from timm.layers import HybridEmbed
from torch import Tensor, nn

from reclip_d2.backbones.positions import patch_numbers, resized_once


def embed_patches(model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens that enter the first block of a ``VisionTransformer`` or ``Eva``, class and register tokens first.

    A learned positional embedding is resized bicubically without antialiasing, so that the model can be exported.

    Returns:
        ``(B, T, E)``, and the grid (h, w).
    """
    embed = model.patch_embed
    if isinstance(embed, HybridEmbed):
        features = embed.backbone(images)
        features = embed.proj(features[-1] if isinstance(features, list | tuple) else features)
        norm = nn.Identity()
    else:
        features, norm = embed.proj(images), embed.norm
    grid = (features.shape[-2], features.shape[-1])
    patches = norm(features.flatten(2).transpose(1, 2))
    prefix = [token for token in (model.cls_token, getattr(model, "reg_token", None)) if token is not None]
    prefix = [token.to(patches.dtype).expand(len(patches), -1, -1) for token in prefix]
    positions = positions_on_grid(model, grid, patches.dtype)
    if positions is None:
        tokens = torch.cat([*prefix, patches], dim=1)
    elif model.no_embed_class:
        tokens = torch.cat([*prefix, patches + positions], dim=1)
    else:
        tokens = torch.cat([*prefix, patches], dim=1) + positions
    return model.norm_pre(tokens), grid


def patch_side(model: nn.Module) -> int:
    """Side of a patch in pixels."""
    embed = model.patch_embed
    return embed.img_size[0] // embed.grid_size[0] if isinstance(embed, HybridEmbed) else embed.patch_size[0]


def stored_grid(model: nn.Module) -> tuple[int, int]:
    """Grid (h, w) of the learned positional embedding as it is stored."""
    height, width = getattr(model, "reclip_grid", model.patch_embed.grid_size)
    return int(height), int(width)


def unplaced_tokens(model: nn.Module) -> int:
    """Rows of the positional embedding that are not of patches."""
    return 0 if model.no_embed_class else model.num_prefix_tokens


def positions_on_grid(model: nn.Module, grid: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor | None:
    """The learned positional embedding on the grid, ``(n, E)`` or, with rows for the other tokens, ``(T, E)``; None if
    the model has none."""
    if model.pos_embed is None:
        return None
    return resized_once(model, model.pos_embed[0], stored_grid(model), grid, dtype, unplaced_tokens(model))


def rotary_embedding(model: nn.Module, patches: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Sines and cosines ``(n, 2 d)`` of a ``RotaryEmbeddingCat``; None if the model has none.

    The same as timm's ``build_rotary_pos_embed``, which cannot be exported for any grid.

    Args:
        patches: a map ``(h, w)`` whose values do not matter.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    bands = rope.bands.to(dtype)
    places = []
    for axis, number in enumerate(patch_numbers(patches)):
        place = number.to(dtype) + rope.grid_offset
        if rope.ref_feat_shape is not None:
            place = place * rope.ref_feat_shape[axis] / patches.shape[axis]
        places.append(place[:, :, None] * bands)  # (h, w, d / 4)
    rows, columns = places
    order = (columns, rows) if rope.grid_indexing == "xy" else (rows, columns)
    angles = torch.cat(order, dim=-1).flatten(0, 1)
    if rope.rotate_half:
        angles = torch.cat([angles, angles], dim=-1)
    else:
        angles = torch.stack([angles, angles], dim=-1).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
