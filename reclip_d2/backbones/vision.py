"""Dense image features of an open_clip Vision Transformer: the value path of its last block.

Shape letters: B images, (H, W) image size in pixels, (h, w) patch grid, n = h*w patches, E width of the
transformer, D width of the joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.errors import ReclipError


def check_value_path(visual: nn.Module, name: str) -> None:
    """Raise :class:`ReclipError` unless ``visual`` is a ViT whose last block has a value path.

    Needed are a patch convolution, a class token, an ``nn.MultiheadAttention`` with one packed input
    projection in each block, and a final projection; pooling by attention, timm towers and ResNets have none.
    """
    reason = None
    if not all(hasattr(visual, part) for part in ("conv1", "class_embedding", "transformer", "ln_post", "proj")):
        reason = "its image tower is not an open_clip Vision Transformer"
    elif getattr(visual, "attn_pool", None) is not None:
        reason = "its image tower pools by attention"
    elif not isinstance(getattr(visual.transformer.resblocks[-1], "attn", None), nn.MultiheadAttention):
        reason = "the blocks of its image tower are not the usual ones"
    elif visual.transformer.resblocks[-1].attn.in_proj_weight is None:
        reason = "its attention has no packed query-key-value projection"
    if reason:
        raise ReclipError(f"MODEL.CLIP.NAME {name!r} is not supported: {reason}; take a ViT such as ViT-B-16-quickgelu")


def resize_positional_embedding(positional_embedding: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize the patch part of a positional embedding bicubically.

    Args:
        positional_embedding: ``(1 + grid_h * grid_w, E)``, the class token's row first.
        grid: (grid_h, grid_w) of the pre-trained embedding.
        size: (h, w) wanted.

    Returns:
        ``(1 + h * w, E)``; the class token's row is passed through. Without a change of size the input itself.
    """
    if grid == size:
        return positional_embedding
    token, patches = positional_embedding[:1], positional_embedding[1:]
    patches = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    # Bicubic interpolation has no low-precision kernel everywhere; the embedding is tiny, so use float32 up.
    dtype = torch.promote_types(patches.dtype, torch.float32)
    patches = F.interpolate(patches.to(dtype), size=size, mode="bicubic", align_corners=False)
    patches = patches.flatten(2).squeeze(0).transpose(0, 1).to(token.dtype)
    return torch.cat([token, patches])


def embed_patches(visual: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens that enter the transformer.

    Args:
        visual: open_clip ``VisionTransformer``.
        images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.

    Returns:
        ``(B, 1 + n, E)`` tokens, the class token first, after ``ln_pre``, and the grid (h, w).
    """
    patches = visual.conv1(images)
    size = (patches.shape[-2], patches.shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
    positions = resize_positional_embedding(visual.positional_embedding, tuple(visual.grid_size), size)
    tokens = torch.cat([token, patches], dim=1) + positions.to(patches.dtype)
    return visual.ln_pre(visual.patch_dropout(tokens)), size


def value_path(block: nn.Module, tokens: Tensor, residual: bool = True) -> Tensor:
    """Last block by its value path (MaskCLIP): ``out_proj(v_proj(ln_1(x)))``.

    Every token keeps its own value instead of a mixture of all, so that the output stays local.

    Args:
        block: open_clip ``ResidualAttentionBlock``.
        tokens: ``(..., E)``.
        residual: keep the block's residual connections and its MLP around the value path (as in the public
            code of MaskCLIP and ReCLIP); otherwise the attention's output alone.
    """
    attention = block.attn
    width = attention.embed_dim
    bias = attention.in_proj_bias
    values = F.linear(
        block.ln_1(tokens), attention.in_proj_weight[2 * width :], None if bias is None else bias[2 * width :]
    )
    out = block.ls_1(attention.out_proj(values))
    if not residual:
        return out
    out = tokens + out
    return out + block.ls_2(block.mlp(block.ln_2(out)))


def key_path(block: nn.Module, tokens: Tensor) -> Tensor:
    """Keys ``k_proj(ln_1(x))`` of the last block, ``(..., E)``: what MaskCLIP's key smoothing compares."""
    attention = block.attn
    width = attention.embed_dim
    bias = attention.in_proj_bias
    return F.linear(
        block.ln_1(tokens),
        attention.in_proj_weight[width : 2 * width],
        None if bias is None else bias[width : 2 * width],
    )


def last_block_input(visual: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens ``(B, n, E)`` that enter the last block, and the grid (h, w).

    The class token takes part in all earlier blocks and is dropped here: the value path mixes no tokens.
    """
    tokens, size = embed_patches(visual, images)
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
    return tokens[:, 1:], size


def patches_inside(windows: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Which patches have their centre in which window; of a window without any, the patch that its centre lies in.

    Args:
        windows: ``(N, 4)`` boxes (x0, y0, x1, y1) in pixels, the ends exclusive.
        grid: (h, w).

    Returns:
        ``(N, n)`` bool, at least one patch in each window.
    """
    edges = windows.double() / patch_size

    def along(first: Tensor, last: Tensor, count: int) -> Tensor:
        centres = torch.arange(count, device=windows.device) + 0.5
        inside = (first[:, None] <= centres) & (centres < last[:, None])
        middle = ((first + last) / 2).floor().long().clamp(0, count - 1)
        nearest = F.one_hot(middle, count).bool()
        return torch.where(inside.any(1, keepdim=True), inside, nearest)

    columns = along(edges[:, 0], edges[:, 2], grid[1])
    rows = along(edges[:, 1], edges[:, 3], grid[0])
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def window_attention_mask(inside: Tensor) -> Tensor:
    """Attention mask of ``[class token, patches, window tokens]``: see :func:`window_image_features`.

    Args:
        inside: ``(N, n)`` bool, which patches lie in which window.

    Returns:
        ``(T, T)`` float, T = 1 + n + N: 0 where a token (row) may look, -inf elsewhere.
    """
    windows, patches = inside.shape
    visible = torch.zeros(1 + patches + windows, 1 + patches + windows, dtype=torch.bool, device=inside.device)
    visible[: 1 + patches, : 1 + patches] = True
    visible[1 + patches :, 1 : 1 + patches] = inside
    visible[1 + patches :, 1 + patches :].fill_diagonal_(True)
    return torch.zeros(visible.shape, device=inside.device).masked_fill_(~visible, float("-inf"))


def window_image_features(visual: nn.Module, images: Tensor, inside: Tensor, split: int = 0) -> Tensor:
    """A global feature for each window of an image, all in one forward pass (not in the papers).

    Each window has a copy of the class token. From block ``split`` on it attends to itself and to the patches in its
    window; patches and the image's own class token never see the copies, so they are as in a forward pass without.
    Cutting the windows out and encoding each as an image of its own costs N forward passes instead of about
    ``1 + N / n``.

    Args:
        images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.
        inside: ``(N, n)`` bool, which patches lie in which window; at least one in each.
        split: block from which on the copies go their own way, from 0 to the last.

    Returns:
        ``(B, N, D)``, not normalised.
    """
    tokens, _ = embed_patches(visual, images)
    blocks = list(visual.transformer.resblocks)
    for block in blocks[:split]:
        tokens = block(tokens)
    tokens = torch.cat([tokens, tokens[:, :1].expand(-1, len(inside), -1)], dim=1)
    mask = window_attention_mask(inside).to(tokens)
    for block in blocks[split:]:
        tokens = block(tokens, attn_mask=mask)
    features = visual.ln_post(tokens[:, -len(inside) :])
    return features if visual.proj is None else features @ visual.proj


def project_dense(visual: nn.Module, tokens: Tensor, residual: bool = True) -> Tensor:
    """Image features Z: value path, ``ln_post``, projection to the joint space, L2 norm of each patch.

    Args:
        tokens: ``(B, n, E)`` from :func:`last_block_input`.

    Returns:
        ``(B, n, D)`` float32 (float64 for a float64 model), rows of length 1.
    """
    features = visual.ln_post(value_path(visual.transformer.resblocks[-1], tokens, residual))
    if visual.proj is not None:
        features = features @ visual.proj
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def dense_image_features(visual: nn.Module, images: Tensor, residual: bool = True) -> tuple[Tensor, tuple[int, int]]:
    """Image features Z of the paper (section III-A): ``(B, n, D)`` and the grid (h, w); see the parts above."""
    tokens, size = last_block_input(visual, images)
    return project_dense(visual, tokens, residual), size
