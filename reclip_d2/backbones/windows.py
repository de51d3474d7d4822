"""Global features of all windows of an image in one pass of an open_clip Vision Transformer (not in the papers).

Shape letters: B images, N windows, (h, w) patch grid, n = h*w patches, D width of the joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.vision import embed_patches
from reclip_d2.layers import autocast_copy


def patches_inside(windows: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Patches of each window: those with their centre inside; if there are none, the patch at the window's centre.

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
        inside: ``(N, n)`` bool, the patches of each window.

    Returns:
        ``(T, T)`` float, T = 1 + n + N: 0 where a token (row) attends to another (column), -inf elsewhere.
    """
    windows, patches = inside.shape
    visible = torch.zeros(1 + patches + windows, 1 + patches + windows, dtype=torch.bool, device=inside.device)
    visible[: 1 + patches, : 1 + patches] = True
    visible[1 + patches :, 1 : 1 + patches] = inside
    visible[1 + patches :, 1 + patches :].fill_diagonal_(True)
    return torch.zeros(visible.shape, device=inside.device).masked_fill_(~visible, float("-inf"))


def window_image_features(visual: nn.Module, images: Tensor, inside: Tensor, split: int = 0) -> Tensor:
    """A global feature for each window of an image, all in one forward pass (not in the papers).

    Each window has a copy of the class token, which from block ``split`` on attends to itself and to the patches of its
    window. Patches and the image's class token never attend to the copies, so they are the same as without. The cost is
    about ``1 + N / n`` forward passes; encoding each window as a separate image costs N.

    Args:
        images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.
        inside: ``(N, n)`` bool, the patches of each window; at least one in each.
        split: index of the first block with separate window tokens, from 0 to the last.

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
    return features if visual.proj is None else features @ autocast_copy(visual.proj)
