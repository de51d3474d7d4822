"""Image towers of timm: against timm's own forward pass, and literal transcriptions in float64.

Shape letters: B images, n = h*w patches, T tokens, E width of the image transformer.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.compat import adapt_image_tower
from reclip_d2.backbones.dense_attention import DENSE_ATTENTION_REGISTRY, ValueAttention
from reclip_d2.backbones.dense_attention.rows import attend
from reclip_d2.backbones.timm_tokens import embed_patches, rotary_embedding
from reclip_d2.backbones.timm_tower import TimmTower
from reclip_d2.backbones.timm_vit import TimmBlock, attention_pool_values
from reclip_d2.backbones.vision import attentional_pooler_values, check_image_tower, dense_image_features
from reclip_d2.errors import ReclipError
from tests.helpers import tiny_clip
from tests.timm_models import PATCH, TOWERS, timm_dense, tiny_timm_clip

ATTENTIONS = ["value", "sclip", "clearclip", "naclip", "resclip", "radseg", "scclip", "dihclip"]
TOLERANCE = {"rtol": 0, "atol": 1e-6}  # rotary angles of timm are in float32


def tower_of(name: str) -> TimmTower:
    return TimmTower(tiny_timm_clip(name).visual.double())


def images_of(tower: TimmTower, height: int = 0, width: int = 0) -> Tensor:
    size = (height * tower.patch_size, width * tower.patch_size) if height else tower.image_size
    torch.manual_seed(0)
    return torch.randn(2, 3, *size, dtype=torch.float64)


def inputs_of_last_block(tower: TimmTower, images: Tensor) -> Tensor:
    """From timm's own forward pass."""
    seen = []
    hook = tower.trunk.blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower.trunk(images)
    hook.remove()
    return seen[0]


# ---- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_input_and_parts_of_the_last_block_are_timms(name):
    tower = tower_of(name)
    images = images_of(tower)
    inputs = tower.last_block_input(images, earlier_blocks=(1,))
    torch.testing.assert_close(inputs.tokens, inputs_of_last_block(tower, images), **TOLERANCE)
    assert inputs.class_tokens == tower.trunk.num_prefix_tokens and inputs.grid == (4, 4) and inputs.count == 3
    torch.testing.assert_close(inputs.earlier[1].block(inputs.earlier[1].tokens), inputs.tokens, **TOLERANCE)
    block, tokens = inputs.block, inputs.tokens
    normed = block.norm(tokens)
    heads = (block.split_heads(part(normed)) for part in (block.queries, block.keys, block.values))
    after = tokens + block.output(block.merge_heads(attend(*heads)))
    after = after + block.mlp(after)
    torch.testing.assert_close(tower.trunk.norm(after), tower.trunk.forward_features(images), **TOLERANCE)
    # Queries of the patches alone are placed as those of all tokens.
    first = inputs.class_tokens
    torch.testing.assert_close(block.queries(normed[:, first:]), block.queries(normed)[:, first:])


def test_rotary_embedding_of_another_size_is_that_of_a_model_of_this_size():
    import timm

    tower, grid = tower_of("small_rotary"), (3, 5)
    other = timm.create_model("small_rotary", img_size=(48, 80), global_pool="avg", num_classes=24).double().eval()
    other.load_state_dict(tower.trunk.state_dict())
    images = images_of(tower, *grid)
    tokens, found = embed_patches(tower.trunk, images)
    rotary = rotary_embedding(tower.trunk, torch.empty(grid), tokens.dtype)
    assert found == grid and rotary.dtype == torch.float64
    torch.testing.assert_close(rotary, other.rope.get_embed().double(), **TOLERANCE)
    for block in tower.trunk.blocks:
        tokens = TimmBlock(block, rotary)(tokens)
    torch.testing.assert_close(tower.trunk.norm(tokens), other.forward_features(images), **TOLERANCE)


def test_rotary_embedding_by_hand():
    """Angles ``position * 16 / side / 10000^(k / (d / 4))``: rows first in a head, then columns."""
    rotary = rotary_embedding(tower_of("small_rotary").trunk, torch.empty(2, 3), torch.float64)
    width = 16  # of a head
    assert rotary.shape == (6, 2 * width)
    for row in range(2):
        for column in range(3):
            places = [row * 16 / 2] * 4 + [column * 16 / 3] * 4
            angles = [place / 10_000 ** ((k % 4) / 4) for k, place in enumerate(places)]
            expected = [f(angle) for f in (math.sin, math.cos) for angle in angles for _ in range(2)]
            assert rotary[3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


# ---- Z -----------------------------------------------------------------------------------------------------------


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    return linear(module.fc2, gelu(linear(module.fc1, x)))


def eva02(tower: TimmTower, x: Tensor) -> Tensor:
    block = tower.trunk.blocks[-1]
    values = linear(block.attn.v_proj, layer_norm(block.norm1, x))
    x = x + linear(block.attn.proj, layer_norm(block.attn.norm, values))
    normed = layer_norm(block.norm2, x)
    gate = linear(block.mlp.fc1_g, normed)
    hidden = gate * torch.sigmoid(gate) * linear(block.mlp.fc1_x, normed)
    x = x + linear(block.mlp.fc2, layer_norm(block.mlp.norm, hidden))
    return linear(tower.trunk.head, layer_norm(tower.trunk.norm, x))


def post_norm(tower: TimmTower, x: Tensor) -> Tensor:
    block = tower.trunk.blocks[-1]
    values = x @ block.attn.qkv.weight[64:].T + block.attn.v_bias
    x = x + layer_norm(block.norm1, linear(block.attn.proj, values))
    x = x + layer_norm(block.norm2, mlp(block.mlp, x))
    return linear(tower.trunk.head, layer_norm(tower.trunk.norm, x))


def clip(tower: TimmTower, x: Tensor) -> Tensor:
    block = tower.trunk.blocks[-1]
    values = layer_norm(block.norm1, x) @ block.attn.qkv.weight[64:].T + block.attn.qkv.bias[64:]
    x = x + linear(block.attn.proj, values)
    x = x + mlp(block.mlp, layer_norm(block.norm2, x))
    return linear(tower.trunk.head, layer_norm(tower.trunk.norm, x))


@pytest.mark.parametrize("literal", [eva02, post_norm, clip], ids=lambda literal: literal.__name__)
def test_value_path_of_towers_with_a_class_token(literal):
    tower = tower_of(f"small_{literal.__name__}")
    images = images_of(tower)
    expected = F.normalize(literal(tower, tower.last_block_input(images).patches), dim=-1)
    torch.testing.assert_close(tower.dense(images, ValueAttention())[0], expected, rtol=0, atol=1e-11)


def test_value_path_of_an_attention_pooling():
    """SigLIP: all blocks unchanged, then, for the input x of the pooling, y = W_o (W_v x + b_v) + b_o and
    y + MLP(norm(y))."""
    tower = tower_of("small_siglip")
    images = images_of(tower)
    pool, seen = tower.trunk.attn_pool, []
    pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower.module(images)
    x = linear(pool.proj, seen[0] @ pool.kv.weight[32:].T + pool.kv.bias[32:])
    expected = F.normalize(x + mlp(pool.mlp, layer_norm(pool.norm, x)), dim=-1)
    torch.testing.assert_close(tower.dense(images, ValueAttention())[0], expected, rtol=0, atol=1e-11)


def test_values_are_what_the_pooling_makes_of_one_patch():
    """A soft-max over one patch is 1."""
    patches = torch.randn(2, 5, 32, dtype=torch.float64)
    for pool, values in (
        (tower_of("small_siglip").trunk.attn_pool, attention_pool_values),
        (tower_of("small_perception").trunk.attn_pool, attention_pool_values),
    ):
        expected = [pool(patches[:, k : k + 1]) for k in range(5)]
        torch.testing.assert_close(values(pool, patches), torch.stack(expected, dim=1))
    for vision in ({}, {"width": 48}):  # with one projection for queries, keys and values, and with three
        visual = tiny_clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4, **vision).visual.double()
        patches = torch.randn(2, 5, visual.ln_pre.weight.shape[0], dtype=torch.float64)
        expected = [visual.attn_pool(patches[:, k : k + 1])[:, 0] for k in range(5)]
        torch.testing.assert_close(attentional_pooler_values(visual.attn_pool, patches), torch.stack(expected, dim=1))


def test_coca():
    """The last block of a tower with open_clip's attentional pooling stays as it is."""
    visual = tiny_clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4).visual.double()
    check_image_tower(visual, "coca")
    images, seen = torch.randn(2, 3, *visual.image_size, dtype=torch.float64), []
    visual.attn_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    visual(images)
    values = attentional_pooler_values(visual.attn_pool, seen[0])[:, 1:]
    expected = F.normalize(layer_norm(visual.ln_post, values) @ visual.proj, dim=-1)
    torch.testing.assert_close(dense_image_features(visual, images, ValueAttention())[0], expected)


def test_the_last_block_before_a_pooling_leaves_out_padding():
    inputs = tower_of("small_siglip").last_block_input(torch.randn(1, 3, 28, 42, dtype=torch.float64))
    valid = torch.tensor([[True, True, False, True, True, False]])
    alone = ValueAttention()(dataclasses.replace(inputs, tokens=inputs.tokens[valid][None]))
    padded = ValueAttention()(dataclasses.replace(inputs, valid=valid))
    torch.testing.assert_close(padded[valid][None], alone)


def test_padding_is_found_by_patches():
    tower = tower_of("small_siglip")
    images = torch.randn(2, 3, 28, 42, dtype=torch.float64)
    valid = tower.last_block_input(images, image_sizes=[(28, 42), (14, 30)]).valid
    assert valid.tolist() == [[True] * 6, [True, True, False, False, False, False]]
    assert tower.last_block_input(images, image_sizes=[(28, 42)] * 2).valid is None


# ---- as a backbone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_every_attention_on_images_of_any_size(name):
    images = torch.randn(2, 3, 3 * PATCH[name], 5 * PATCH[name])
    backbone = timm_dense(name)
    for attention in ATTENTIONS:
        backbone.attention = DENSE_ATTENTION_REGISTRY.get(attention)()
        assert backbone.patch_size == PATCH[name] and backbone.size_divisibility == PATCH[name]
        sizes = [tuple(images.shape[-2:]), (2 * PATCH[name], 3 * PATCH[name])]
        dense, keys = backbone.dense_and_keys(images, sizes)
        assert dense.shape == (2, backbone.embed_dim, 3, 5) and keys.shape == (2, 15, 32), attention
        torch.testing.assert_close(dense.norm(dim=1), torch.ones(2, 3, 5))
    images = torch.randn(2, 3, *backbone.image_size)
    expected = F.normalize(backbone.clip.encode_image(images), dim=-1)
    torch.testing.assert_close(backbone.global_features(images), expected)
    grid = (2, 7)
    with backbone.on_grid(grid):
        stored = backbone.dense(torch.ones(1, 3, 2 * PATCH[name], 7 * PATCH[name]))
    torch.testing.assert_close(stored, backbone.dense(torch.ones(1, 3, 2 * PATCH[name], 7 * PATCH[name])))


@pytest.mark.parametrize("name", ["small_siglip", "small_eva02"])
def test_autocast(name):
    images = torch.randn(1, 3, 4 * PATCH[name], 4 * PATCH[name])
    exact, low = timm_dense(name), timm_dense(name, autocast_dtype=torch.bfloat16)
    assert low.dense(images).dtype == torch.float32
    assert F.cosine_similarity(exact.dense(images), low.dense(images)).min() > 0.995
    assert not torch.equal(exact.dense(images), low.dense(images))


@pytest.mark.parametrize("name", ["small_siglip", "small_rotary"])
def test_fine_tuning_trains_what_dense_features_depend_on(name):
    backbone = timm_dense(name, fine_tune=True)
    backbone.dense(torch.randn(1, 3, 3 * PATCH[name], 3 * PATCH[name]))[:, 0].sum().backward()
    trained = {key for key, weight in backbone.clip.visual.named_parameters() if weight.requires_grad}
    got = {key for key, weight in backbone.clip.visual.named_parameters() if weight.grad is not None}
    assert trained == got and "trunk.patch_embed.proj.weight" in trained
    without = {key for key, _ in backbone.clip.visual.named_parameters()} - trained
    if name == "small_siglip":
        assert without == {"trunk.attn_pool.latent", "trunk.attn_pool.q.weight", "trunk.attn_pool.q.bias"}
    else:
        assert without == {"trunk.blocks.2.attn.q_bias"}


def test_refusals():
    with pytest.raises(ReclipError, match=r"VALUE_PATH_RESIDUAL .* small_siglip .* attention pooling"):
        timm_dense("small_siglip", attention=ValueAttention(residual=False))
    with pytest.raises(ReclipError, match=r"LAYER_NORM_EPS.* ViT of open_clip"):
        adapt_image_tower(tiny_timm_clip("small_eva02").visual, layer_norm_eps=1e-6)
    with pytest.raises(ReclipError, match=r"METHOD one_pass .* crops"):
        timm_dense("small_eva02").window_features(torch.zeros(1, 3, 32, 32), torch.tensor([[0, 0, 16, 16]]))
    visual = tiny_timm_clip("small_siglip").visual
    visual.trunk.blocks[1].attn = nn.Identity()
    with pytest.raises(ReclipError, match="'broken' is not supported: the blocks of its VisionTransformer"):
        check_image_tower(visual, "broken")
