"""Dense features of the image tower against literal formulas in float64.

Shape letters: B images, (h, w) patch grid, n = h*w patches, E width of the transformer, D joint embedding.
"""

import math

import open_clip
import pytest
import torch
from torch import nn

from reclip_d2.backbones.dense_attention import ValueAttention
from reclip_d2.backbones.vision import (
    OpenClipBlock,
    check_image_tower,
    dense_image_features,
    embed_patches,
    global_image_features,
    last_block_input,
)
from reclip_d2.errors import ReclipError
from tests.backbones.literal import PATCH, literal_dense, literal_layer_norm, literal_tokens
from tests.helpers import EMBED_DIM, TINY_TEXT, tiny_clip

# ---- tokens and blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (24, 56), (8, 8)])
def test_tokens_before_the_transformer(size):
    visual = tiny_clip().visual.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens, grid = embed_patches(visual, images)
    assert grid == (size[0] // PATCH, size[1] // PATCH)
    expected = torch.stack([literal_tokens(visual, image) for image in images])
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-11)


def test_a_block_in_its_parts_is_the_block():
    block = tiny_clip(ls_init_value=0.5).visual.transformer.resblocks[-1].double()
    parts, x = OpenClipBlock(block), torch.randn(2, 5, 32, dtype=torch.float64)
    normed = parts.norm(x)
    heads = [parts.split_heads(part(normed)) for part in (parts.queries, parts.keys, parts.values)]
    assert [tuple(head.shape) for head in heads] == [(2, 2, 5, 16)] * 3
    weights = (heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(16)).softmax(-1)
    out = x + parts.output(parts.merge_heads(weights @ heads[2]))
    torch.testing.assert_close(out + parts.mlp(out), block(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_projections_are_shares_of_the_packed_one(part):
    block = tiny_clip().visual.transformer.resblocks[-1].double()
    x, rows = torch.randn(2, 5, 32, dtype=torch.float64), {"queries": 0, "keys": 32, "values": 64}[part]
    weight, bias = (t[rows : rows + 32] for t in (block.attn.in_proj_weight, block.attn.in_proj_bias))
    expected = literal_layer_norm(x, block.ln_1) @ weight.T + bias
    parts = OpenClipBlock(block)
    torch.testing.assert_close(getattr(parts, part)(parts.norm(x)), expected, rtol=0, atol=1e-12)


# ---- what a dense attention gets --------------------------------------------------------------------------------


def test_input_of_the_last_block():
    visual = tiny_clip().visual.double()
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    inputs = last_block_input(visual, images, earlier_blocks=(1,))
    assert inputs.images is images and inputs.grid == (3, 5) and inputs.valid is None and inputs.class_tokens == 1
    tokens = [embed_patches(visual, images)[0]]
    for block in visual.transformer.resblocks:
        tokens.append(block(tokens[-1]))
    torch.testing.assert_close(inputs.tokens, tokens[2], rtol=0, atol=0)
    assert torch.equal(inputs.patches, inputs.tokens[:, 1:])
    assert set(inputs.earlier) == {1}
    torch.testing.assert_close(inputs.earlier[1].tokens, tokens[1], rtol=0, atol=0)
    block = inputs.earlier[1].block
    expected = literal_layer_norm(tokens[1], visual.transformer.resblocks[1].ln_1)
    torch.testing.assert_close(block.norm(tokens[1]), expected)


def test_patches_of_the_padding_are_not_valid():
    visual, images = tiny_clip().visual, torch.zeros(2, 3, 16, 24)
    valid = last_block_input(visual, images, image_sizes=[(16, 24), (12, 20)]).valid
    assert valid.tolist() == [[True] * 6, [True, True, False, False, False, False]]
    assert last_block_input(visual, images, image_sizes=[(16, 24)] * 2).valid is None


# ---- dense features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_dense_features_against_the_literal_formula(size, residual):
    visual = tiny_clip().visual.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    features, inputs = dense_image_features(visual, images, ValueAttention(residual))
    assert features.dtype == torch.float64 and inputs.grid == (size[0] // PATCH, size[1] // PATCH)
    expected = torch.stack([literal_dense(visual, image, residual) for image in images])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)


def test_without_projection_the_width_stays():
    visual = tiny_clip().visual.double()
    visual.proj = None
    features, _ = dense_image_features(visual, torch.randn(1, 3, 16, 16, dtype=torch.float64), ValueAttention())
    assert features.shape == (1, 4, 32)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4, dtype=torch.float64))


def test_half_precision_features_come_out_in_float32():
    visual = tiny_clip().visual.bfloat16()
    features, _ = dense_image_features(visual, torch.randn(1, 3, 16, 16, dtype=torch.bfloat16), ValueAttention())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4))


# ---- towers without a value path --------------------------------------------------------------------------------


def _refused(visual: nn.Module) -> str:
    with pytest.raises(ReclipError) as caught:
        check_image_tower(visual, "some-model")
    message = str(caught.value)
    assert "\n" not in message and "some-model" in message and "MODEL.CLIP.NAME" in message
    return message


def test_resnet_is_refused():
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=32)
    clip = open_clip.CLIP(EMBED_DIM, vision, open_clip.CLIPTextCfg(**TINY_TEXT))
    assert "Vision Transformer" in _refused(clip.visual)


def test_two_attention_poolings_are_refused():
    clip = tiny_clip(attentional_pool="parallel", attn_pooler_heads=2, attn_pooler_queries=4)
    assert "pools by attention twice" in _refused(clip.visual)


def test_blocks_of_another_kind_are_refused():
    assert "blocks" in _refused(tiny_clip(block_type="custom", qk_norm=True).visual)


def test_unpacked_attention_is_refused():
    visual = tiny_clip().visual
    visual.transformer.resblocks[-1].attn = nn.MultiheadAttention(32, 2, kdim=16, vdim=16)
    assert "packed" in _refused(visual)


def test_usual_tower_is_accepted():
    check_image_tower(tiny_clip().visual, "some-model")


# ---- global features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vision",
    [{}, {"final_ln_after_pool": True}, {"pool_type": "avg"}, {"no_ln_pre": True}, {"patch_dropout": 0.5}],
    ids=str,
)
def test_global_features_are_open_clips(vision):
    """By the class token's row of the last block; a tower that averages its patches is open_clip's business."""
    clip = tiny_clip(**vision).double()
    images = torch.randn(3, 3, *clip.visual.image_size, dtype=torch.float64)
    found = global_image_features(clip.visual, images)
    if vision.get("pool_type") == "avg":
        assert found is None
    else:
        torch.testing.assert_close(found, clip.encode_image(images), rtol=0, atol=1e-12)
