"""Literal formulas of an open_clip image tower, token by token.

Shape letters: (h, w) patch grid, n = h*w patches, T tokens, E width of the transformer, D joint embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 8


def literal_layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def literal_attention(x: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """Multi-head self-attention of ``(T, E)`` tokens, head by head."""
    width, heads = attention.embed_dim, attention.num_heads
    packed = x @ attention.in_proj_weight.T + attention.in_proj_bias
    query, key, value = packed[:, :width], packed[:, width : 2 * width], packed[:, 2 * width :]
    size = width // heads
    parts = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(size), dim=-1)
        parts.append(weights @ value[:, part])
    return torch.cat(parts, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias


def literal_mlp(x: Tensor, block: nn.Module, quick: bool) -> Tensor:
    hidden = x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def literal_value_path(x: Tensor, block: nn.Module, residual: bool, quick: bool = False) -> Tensor:
    width = block.attn.embed_dim
    value = literal_layer_norm(x, block.ln_1) @ block.attn.in_proj_weight[2 * width :].T
    value = value + block.attn.in_proj_bias[2 * width :]
    out = value @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    if not residual:
        return out
    out = x + out
    return out + literal_mlp(literal_layer_norm(out, block.ln_2), block, quick)


def literal_position_grid(embedding: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``(1 + h * w, E)``: each channel laid out as a picture row by row, resized by torch, and read row by row."""
    picture = torch.empty(1, embedding.shape[1], *grid, dtype=embedding.dtype)
    for row in range(grid[0]):
        for column in range(grid[1]):
            picture[0, :, row, column] = embedding[1 + row * grid[1] + column]
    picture = F.interpolate(picture, size=size, mode="bicubic", align_corners=False)
    rows = [embedding[0]]
    rows += [picture[0, :, row, column] for row in range(size[0]) for column in range(size[1])]
    return torch.stack(rows)


def literal_tokens(visual: nn.Module, image: Tensor) -> Tensor:
    """Tokens of one image ``(3, H, W)`` that enter the transformer, patch by patch."""
    height, width = image.shape[1] // PATCH, image.shape[2] // PATCH
    tokens = [visual.class_embedding]
    for row in range(height):
        for column in range(width):
            patch = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            tokens.append((visual.conv1.weight * patch).sum((1, 2, 3)))
    positions = visual.positional_embedding
    if tuple(visual.grid_size) != (height, width):
        positions = literal_position_grid(positions, tuple(visual.grid_size), (height, width))
    return literal_layer_norm(torch.stack(tokens) + positions, visual.ln_pre)


def literal_dense(visual: nn.Module, image: Tensor, residual: bool, quick: bool = False) -> Tensor:
    """Z ``(n, D)`` of one image; the class token stays to the very end and is dropped there."""
    x = literal_tokens(visual, image)
    for block in visual.transformer.resblocks[:-1]:
        x = x + literal_attention(literal_layer_norm(x, block.ln_1), block.attn)
        x = x + literal_mlp(literal_layer_norm(x, block.ln_2), block, quick)
    x = literal_value_path(x, visual.transformer.resblocks[-1], residual, quick)
    x = literal_layer_norm(x, visual.ln_post) @ visual.proj
    return x[1:] / x[1:].norm(dim=1, keepdim=True)
