"""sclip, clearclip, naclip, resclip and radseg against literal formulas in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import rows
from reclip_d2.backbones.dense_attention.base import AttentionInput
from reclip_d2.backbones.dense_attention.clearclip import ClearCLIPAttention
from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.backbones.dense_attention.naclip import NACLIPAttention
from reclip_d2.backbones.dense_attention.radseg import RADSegAttention
from reclip_d2.backbones.dense_attention.resclip import ResCLIPAttention
from reclip_d2.backbones.dense_attention.sclip import SCLIPAttention
from reclip_d2.backbones.vision import dense_image_features
from reclip_d2.errors import ReclipError
from tests.backbones.dense_attention.inputs import (
    HEADS,
    cosines,
    head,
    literal_output,
    literal_projections,
    literal_softmax,
    make_input,
    only_positive,
    self_scores,
    tower,
)
from tests.backbones.literal import literal_layer_norm, literal_mlp


def last_block() -> nn.Module:
    return tower().transformer.resblocks[-1]


def with_residual(tokens: Tensor, out: Tensor) -> Tensor:
    block = last_block()
    out = tokens + out
    return out + literal_mlp(literal_layer_norm(out, block.ln_2), block, quick=False)


def literal_weights(scores: list[Tensor], inputs: AttentionInput) -> Tensor:
    """``output(softmax(scores) v)`` of all tokens, from the scores of each head."""
    _, _, values = literal_projections(inputs.tokens[0], last_block())
    mixed = [literal_softmax(one) @ head(values, index) for index, one in enumerate(scores)]
    return literal_output(torch.cat(mixed, dim=1), last_block())


def gaussian(grid: tuple[int, int], sigma: float) -> Tensor:
    """``w`` of all tokens, entry by entry."""
    height, width = grid
    bias = torch.zeros(1 + height * width, 1 + height * width, dtype=torch.float64)
    for i in range(height * width):
        for j in range(height * width):
            squared = (i // width - j // width) ** 2 + (i % width - j % width) ** 2
            bias[1 + i, 1 + j] = math.exp(-squared / (2 * sigma**2))
    return bias


def check(attention: object, inputs: AttentionInput, expected: Tensor) -> None:
    torch.testing.assert_close(attention(inputs)[0], expected[1:], rtol=0, atol=1e-11)


def test_sclip():
    attention = SCLIPAttention()
    inputs = make_input(attention)
    queries, keys, values = literal_projections(inputs.tokens[0], last_block())
    mixed = []
    for index in range(HEADS):
        weights = literal_softmax(self_scores(head(queries, index))) + literal_softmax(self_scores(head(keys, index)))
        mixed.append(weights @ head(values, index))
    out = literal_output(torch.cat(mixed, dim=1), last_block())
    check(attention, inputs, with_residual(inputs.tokens[0], out))
    assert attention.uses_mlp
    check(SCLIPAttention("drop"), inputs, out)


def test_clearclip():
    attention = ClearCLIPAttention()
    inputs = make_input(attention)
    queries, _, _ = literal_projections(inputs.tokens[0], last_block())
    out = literal_weights([self_scores(head(queries, index)) for index in range(HEADS)], inputs)
    check(attention, inputs, out)
    assert not attention.uses_mlp
    check(ClearCLIPAttention("keep"), inputs, with_residual(inputs.tokens[0], out))


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (6, 2)])
@pytest.mark.parametrize("sigma", [5.0, 0.8])
def test_naclip(grid, sigma):
    attention = NACLIPAttention(sigma=sigma)
    inputs = make_input(attention, grid)
    _, keys, _ = literal_projections(inputs.tokens[0], last_block())
    bias = gaussian(grid, sigma)
    check(attention, inputs, literal_weights([self_scores(head(keys, index)) + bias for index in range(HEADS)], inputs))


@pytest.mark.parametrize("blocks", [(0, 1), (1,)])
def test_resclip(blocks):
    attention = ResCLIPAttention(weight=0.4, sigma=2.0, blocks=blocks)
    inputs = make_input(attention)
    assert list(inputs.earlier) == list(blocks)
    _, keys, values = literal_projections(inputs.tokens[0], last_block())
    mixed = []
    for index in range(HEADS):
        weights = 0.6 * literal_softmax(self_scores(head(keys, index)) + gaussian(inputs.grid, 2.0))
        for number in blocks:
            block = tower().transformer.resblocks[number]
            q, k, _ = literal_projections(inputs.earlier[number].tokens[0], block)
            weights = weights + 0.4 / len(blocks) * literal_softmax(head(q, index) @ head(k, index).T / 4)
        mixed.append(weights @ head(values, index))
    check(attention, inputs, literal_output(torch.cat(mixed, dim=1), last_block()))


def test_resclip_without_a_second_attention(monkeypatch):
    """Middle blocks that add their matrices up give what a second attention gives, which padded images keep."""
    attention, images = ResCLIPAttention(blocks=(0, 1)), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        features, inputs = dense_image_features(tower(), images, attention)
        assert inputs.kept.shape == (2, HEADS, inputs.patches.shape[1], inputs.tokens.shape[1])
        torch.testing.assert_close(inputs.kept.sum(-1), torch.full_like(inputs.kept[..., 0], 2))
        assert dense_image_features(tower(), images, attention, [(24, 32), (24, 16)])[1].kept is None
        monkeypatch.setattr(rows, "MAX_SCORES", 100)
        expected, inputs = dense_image_features(tower(), images, attention)
    assert inputs.kept is None
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


def test_middle_blocks_of_resclip():
    """5 to 8 of 12, as in the paper's code; never the last block."""
    blocks = ResCLIPAttention().earlier_blocks
    assert list(blocks(12)) == [5, 6, 7, 8] and list(blocks(24)) == list(range(10, 18))
    assert list(blocks(3)) == [1] and list(blocks(2)) == [0]
    with pytest.raises(
        ReclipError, match=r"RESCLIP_BLOCKS is \[3, 11\]: give the first and the last of the blocks 0 to 10"
    ):
        ResCLIPAttention(blocks=(3, 11)).earlier_blocks(12)


def literal_scra(inputs: AttentionInput, scale: float) -> Tensor:
    queries, keys, values = literal_projections(inputs.tokens[0], last_block())
    out = literal_weights([head(queries, index) @ head(keys, index).T / 4 for index in range(HEADS)], inputs)
    if not scale:
        return with_residual(inputs.tokens[0], out)
    scores = [only_positive(scale * cosines(head(out, index))) for index in range(HEADS)]
    assert all((one == -math.inf).any() for one in scores)
    return with_residual(inputs.tokens[0], literal_weights(scores, inputs))


@pytest.mark.parametrize("scale", [10.0, 0.0])
def test_radseg_attention(scale):
    attention = RADSegAttention(attention_scale=scale)
    inputs = make_input(attention)
    check(attention, inputs, literal_scra(inputs, scale))


def test_radseg_without_scales_is_the_blocks_own_attention():
    inputs = make_input(attention := RADSegAttention(attention_scale=0, feature_scale=0))
    torch.testing.assert_close(attention(inputs), last_block()(inputs.tokens)[:, 1:], rtol=0, atol=1e-12)
    features = torch.randn(1, 15, 24)
    assert attention.refine(features, inputs) is features


def test_radseg_features():
    attention = RADSegAttention(feature_scale=7.0)
    inputs = make_input(attention, batch=2)
    features = torch.randn(2, 15, 24, dtype=torch.float64) + 0.5
    refined = attention.refine(features, inputs)
    for one, own in zip(features, refined, strict=True):
        similarities = cosines(one)
        expected = literal_softmax(only_positive(7.0 * (similarities - similarities.mean()))) @ one
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [ClearCLIPAttention, SCLIPAttention, NACLIPAttention, ResCLIPAttention])
def test_feedback(kind):
    """Scores are ``gain s + bias``; class tokens get no bias, and NACLIP's Gaussian is added afterwards."""
    attention = kind("drop")
    inputs = make_input(attention)
    bias = torch.rand(15, 15, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = dataclasses.replace(inputs, feedback=Feedback(1.7, lambda rows: bias[rows]))
    queries, keys, values = literal_projections(inputs.tokens[0], last_block())
    added = torch.zeros(16, 16, dtype=torch.float64)
    added[1:, 1:] = bias
    local = gaussian(inputs.grid, 5.0) if isinstance(attention, NACLIPAttention) else torch.zeros_like(added)
    parts = {ClearCLIPAttention: (queries,), SCLIPAttention: (queries, keys)}.get(kind, (keys,))
    mixed = []
    for index in range(HEADS):
        weights = sum(literal_softmax(1.7 * self_scores(head(part, index)) + added + local) for part in parts)
        if kind is ResCLIPAttention:
            weights = 0.7 * weights
            for number, earlier in inputs.earlier.items():
                q, k, _ = literal_projections(earlier.tokens[0], tower().transformer.resblocks[number])
                weights = weights + 0.3 / len(inputs.earlier) * literal_softmax(head(q, index) @ head(k, index).T / 4)
        mixed.append(weights @ head(values, index))
    check(attention, inputs, literal_output(torch.cat(mixed, dim=1), last_block()))
