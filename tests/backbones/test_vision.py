"""Dense features of the image tower against literal formulas in float64.

Shape letters: B images, (h, w) patch grid, n = h*w patches, E width of the transformer, D joint embedding.
"""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.vision import (
    check_value_path,
    dense_image_features,
    embed_patches,
    key_path,
    last_block_input,
    patches_inside,
    project_dense,
    resize_positional_embedding,
    value_path,
    window_image_features,
)
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, TINY_TEXT, tiny_clip

PATCH = 8


# ---- the literal formulas -------------------------------------------------------------------------------------


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


# ---- positional embedding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (3, 7)), ((2, 5), (6, 3)), ((3, 2), (1, 1)), ((4, 4), (8, 8))])
def test_positional_embedding_is_resized_as_torch_does(grid, size):
    embedding = torch.randn(1 + grid[0] * grid[1], 6, dtype=torch.float64)
    resized = resize_positional_embedding(embedding, grid, size)
    assert resized.shape == (1 + size[0] * size[1], 6)
    torch.testing.assert_close(resized, literal_position_grid(embedding, grid, size), rtol=0, atol=1e-12)
    assert torch.equal(resized[0], embedding[0])


def test_positional_embedding_of_the_native_grid_is_untouched():
    embedding = torch.randn(1 + 6, 4)
    assert resize_positional_embedding(embedding, (2, 3), (2, 3)) is embedding


def test_transposed_grid_is_resized_though_the_number_of_patches_is_the_same():
    embedding = torch.randn(1 + 6, 4, dtype=torch.float64)
    resized = resize_positional_embedding(embedding, (2, 3), (3, 2))
    torch.testing.assert_close(resized, literal_position_grid(embedding, (2, 3), (3, 2)))
    assert not torch.allclose(resized, embedding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positional_embedding_keeps_a_low_precision_dtype(dtype):
    embedding = torch.randn(1 + 9, 4)
    resized = resize_positional_embedding(embedding.to(dtype), (3, 3), (5, 4))
    assert resized.dtype == dtype
    torch.testing.assert_close(resized.float(), literal_position_grid(embedding, (3, 3), (5, 4)), rtol=0.05, atol=0.05)


# ---- tokens and blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (24, 56), (8, 8)])
def test_tokens_before_the_transformer(size):
    visual = tiny_clip().visual.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens, grid = embed_patches(visual, images)
    assert grid == (size[0] // PATCH, size[1] // PATCH)
    expected = torch.stack([literal_tokens(visual, image) for image in images])
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("quick", [True, False])
def test_value_path(residual, quick):
    block = tiny_clip(quick_gelu=quick).visual.transformer.resblocks[-1].double()
    x = torch.randn(5, 32, dtype=torch.float64)
    out = value_path(block, x, residual)
    torch.testing.assert_close(out, literal_value_path(x, block, residual, quick), rtol=0, atol=1e-12)


def test_value_path_is_attention_with_the_identity_as_its_weights():
    """The block's own attention gives the value path when each token sees only itself."""
    block = tiny_clip().visual.transformer.resblocks[-1].double()
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    only_itself = torch.full((6, 6), float("-inf"), dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(value_path(block, x), block(x, attn_mask=only_itself), rtol=0, atol=1e-12)


def test_value_path_heeds_layer_scale():
    visual = tiny_clip(ls_init_value=0.5).visual.double()
    block = visual.transformer.resblocks[-1]
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    only_itself = torch.full((4, 4), float("-inf"), dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(value_path(block, x), block(x, attn_mask=only_itself), rtol=0, atol=1e-12)


def test_key_path():
    block = tiny_clip().visual.transformer.resblocks[-1].double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = literal_layer_norm(x, block.ln_1) @ block.attn.in_proj_weight[32:64].T + block.attn.in_proj_bias[32:64]
    torch.testing.assert_close(key_path(block, x), expected, rtol=0, atol=1e-12)


# ---- dense features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_dense_features_against_the_literal_formula(size, residual):
    visual = tiny_clip().visual.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    features, grid = dense_image_features(visual, images, residual)
    assert features.dtype == torch.float64 and grid == (size[0] // PATCH, size[1] // PATCH)
    expected = torch.stack([literal_dense(visual, image, residual) for image in images])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)


def test_class_token_takes_part_in_the_earlier_blocks_and_only_there():
    visual = tiny_clip().visual.double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    tokens, _ = last_block_input(visual, images)
    assert tokens.shape == (1, 16, 32)
    before = project_dense(visual, tokens)
    visual.class_embedding.add_(torch.randn(32))
    changed, _ = last_block_input(visual, images)
    assert not torch.allclose(tokens, changed)
    torch.testing.assert_close(project_dense(visual, tokens), before, rtol=0, atol=0)


def test_without_projection_the_width_stays():
    visual = tiny_clip().visual.double()
    visual.proj = None
    features, _ = dense_image_features(visual, torch.randn(1, 3, 16, 16, dtype=torch.float64))
    assert features.shape == (1, 4, 32)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4, dtype=torch.float64))


def test_half_precision_features_come_out_in_float32():
    visual = tiny_clip().visual
    features = project_dense(visual.bfloat16(), torch.randn(1, 4, 32, dtype=torch.bfloat16))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4))


# ---- towers without a value path --------------------------------------------------------------------------------


def _refused(visual: nn.Module) -> str:
    with pytest.raises(ReclipError) as caught:
        check_value_path(visual, "some-model")
    message = str(caught.value)
    assert "\n" not in message and "some-model" in message and "MODEL.CLIP.NAME" in message
    return message


def test_resnet_is_refused():
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=32)
    clip = open_clip.CLIP(EMBED_DIM, vision, open_clip.CLIPTextCfg(**TINY_TEXT))
    assert "Vision Transformer" in _refused(clip.visual)


def test_attention_pooling_is_refused():
    clip = tiny_clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4)
    assert "pools by attention" in _refused(clip.visual)


def test_blocks_of_another_kind_are_refused():
    assert "blocks" in _refused(tiny_clip(block_type="custom", qk_norm=True).visual)


def test_unpacked_attention_is_refused():
    visual = tiny_clip().visual
    visual.transformer.resblocks[-1].attn = nn.MultiheadAttention(32, 2, kdim=16, vdim=16)
    assert "packed" in _refused(visual)


def test_usual_tower_is_accepted():
    check_value_path(tiny_clip().visual, "some-model")


# ---- windows in one pass ----------------------------------------------------------------------------------------


def literal_block(x: Tensor, block: nn.Module, quick: bool = False) -> Tensor:
    x = x + literal_attention(literal_layer_norm(x, block.ln_1), block.attn)
    return x + literal_mlp(literal_layer_norm(x, block.ln_2), block, quick)


def literal_window_feature(visual: nn.Module, image: Tensor, inside: Tensor, split: int) -> Tensor:
    """One window by itself: a sequence of its token and its patches, whose states are those of the whole image."""
    tokens = embed_patches(visual, image[None])[0][0]
    own = tokens[:1]
    for index, block in enumerate(visual.transformer.resblocks):
        if index < split:
            own = literal_block(tokens, block)[:1]
        else:
            own = literal_block(torch.cat([own, tokens[1:][inside]]), block)[:1]
        tokens = literal_block(tokens, block)
    return literal_layer_norm(own[0], visual.ln_post) @ visual.proj


@pytest.mark.parametrize("split", [0, 1, 2])
def test_windows_equal_each_by_itself(split):
    visual = tiny_clip().double().visual
    images = torch.randn(2, 3, 5 * PATCH, 3 * PATCH, dtype=torch.float64)
    inside = torch.zeros(4, 15, dtype=torch.bool)
    inside[0, 3], inside[1, :7], inside[2, 14], inside[3] = True, True, True, True
    got = window_image_features(visual, images, inside, split)
    assert got.shape == (2, 4, EMBED_DIM)
    for image, features in zip(images, got, strict=True):
        for window, feature in zip(inside, features, strict=True):
            wanted = literal_window_feature(visual, image, window, split)
            torch.testing.assert_close(feature, wanted, rtol=1e-10, atol=1e-10)


def test_a_window_of_the_whole_image_has_its_global_feature():
    clip = tiny_clip().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for split in range(3):
        got = window_image_features(clip.visual, images, torch.ones(1, 16, dtype=torch.bool), split)
        torch.testing.assert_close(got[:, 0], clip.encode_image(images), rtol=1e-10, atol=1e-10)


def test_patches_inside_go_by_their_centres():
    # A grid of 2 x 3 patches of 8 px: centres at x = 4, 12, 20 and y = 4, 12.
    boxes = [[0, 0, 24, 16], [4, 0, 12, 8], [5, 5, 24, 16], [0, 12, 13, 16], [5, 5, 7, 7], [23, 15, 24, 16]]
    wanted = ["111 111", "100 000", "000 011", "000 110", "100 000", "000 001"]
    got = patches_inside(torch.tensor(boxes), (2, 3), 8)
    assert got.tolist() == [[mark == "1" for mark in row.replace(" ", "")] for row in wanted]
