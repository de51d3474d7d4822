"""scclip and dihclip against literal formulas in float64, and their parts by hand."""

import math

import pytest
import torch
from torch import Tensor

from reclip_d2.backbones.dense_attention import rows
from reclip_d2.backbones.dense_attention.base import AttentionInput
from reclip_d2.backbones.dense_attention.dihclip import DiHCLIPAttention
from reclip_d2.backbones.dense_attention.scclip import SCCLIPAttention, largest, local_outlier_factors
from reclip_d2.backbones.dense_attention.self_calibration import neighbour_means
from tests.backbones.dense_attention.inputs import (
    HEADS,
    cosines,
    head,
    literal_output,
    literal_projections,
    literal_softmax,
    make_input,
    only_positive,
    padded,
    self_scores,
    tower,
)


def literal_factors(features: Tensor, k: int) -> Tensor:
    """Breunig's definition, patch by patch."""
    count = len(features)
    distance = [[float((a - b).norm()) for b in features] for a in features]
    near = [sorted((j for j in range(count) if j != i), key=lambda j: distance[i][j])[:k] for i in range(count)]
    of_kth = [distance[i][near[i][-1]] for i in range(count)]
    density = [len(near[i]) / sum(max(of_kth[j], distance[i][j]) for j in near[i]) for i in range(count)]
    return torch.tensor(
        [sum(density[j] for j in near[i]) / len(near[i]) / density[i] for i in range(count)], dtype=features.dtype
    )


def literal_filled(tokens: Tensor, anomalous: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = grid
    out = tokens.clone()
    for i in anomalous.nonzero()[:, 0].tolist():
        around = [
            tokens[y * width + x]
            for y in range(i // width - 1, i // width + 2)
            for x in range(i % width - 1, i % width + 2)
            if 0 <= y < height and 0 <= x < width and not anomalous[y * width + x]
        ]
        if around:
            out[i] = torch.stack(around).mean(0)
    return out


def literal_aggregate(features: Tensor, values: Tensor) -> Tensor:
    similarities = cosines(features)
    weights = torch.where(similarities < 0.4, 0, similarities)
    return weights / (weights.sum(1, keepdim=True) + 1e-6) @ values


def of_similarity(middle: Tensor) -> Tensor:
    similarities = cosines(middle)
    return literal_softmax(only_positive(3 * (similarities - similarities.mean())))


def lowest_entropy(weights: list[Tensor], count: int) -> list[int]:
    entropies = [-sum(p * math.log2(p + 1e-6) for p in one.flatten().tolist()) for one in weights]
    return sorted(range(len(weights)), key=entropies.__getitem__)[:count]


def literal_calibrated(inputs: AttentionInput, x: Tensor, middle: Tensor, attention: object) -> Tensor:
    """The common part. Of 3 blocks, 8 of 12 is block 1 (the last but one), 3 is block 0, and 3 to 9 are 0 and 1."""
    shallow = inputs.earlier[1].tokens[0]
    x = literal_aggregate(middle, x)
    levels = shallow + inputs.tokens[0]
    out = attention(x, middle) + 0.3 * inputs.tokens[0, 0] + attention(levels[1:], middle) + 0.3 * levels[0]
    return literal_aggregate(shallow[1:], out)


def test_scclip():
    attention = SCCLIPAttention(neighbours=4, anomalies=0.2)
    inputs = make_input(attention, (4, 5))
    patches = inputs.tokens[0, 1:]
    factors = literal_factors(patches, 4)
    anomalous = factors > torch.quantile(factors, 0.8)
    assert anomalous.sum() == 4
    x = middle = literal_filled(patches, anomalous, inputs.grid)  # the middle block's output is the last block's input

    def last(tokens: Tensor, middle: Tensor) -> Tensor:
        block = tower().transformer.resblocks[-1]
        _, keys, values = literal_projections(tokens, block)
        mixed = []
        for index in range(HEADS):
            weights = (of_similarity(middle) + literal_softmax(self_scores(head(keys, index)))) / 2
            mixed.append(weights @ head(values, index))
        return literal_output(torch.cat(mixed, dim=1), block)

    expected = literal_calibrated(inputs, x, middle, last)
    torch.testing.assert_close(attention(inputs)[0], expected, rtol=0, atol=1e-9)


def test_dihclip_in_blocks_of_rows(monkeypatch):
    """As at once, whether similarities are kept or not."""
    attention = DiHCLIPAttention(heads=1)
    inputs = make_input(attention)
    expected = attention(inputs)
    for most in (2**25, 100):
        monkeypatch.setattr(rows, "CACHED_SCORES", 100)
        monkeypatch.setattr(rows, "MAX_SCORES", most)
        torch.testing.assert_close(attention(inputs), expected, rtol=0, atol=1e-12)


def test_dihclip():
    attention = DiHCLIPAttention(heads=1)
    inputs = make_input(attention)
    block = tower().transformer.resblocks[1]
    queries, keys, values = literal_projections(inputs.earlier[1].tokens[0], block)
    own = [literal_softmax(head(queries, index) @ head(keys, index).T / 4) for index in range(HEADS)]
    (chosen,) = lowest_entropy(own, 1)
    detail = literal_output(literal_softmax(self_scores(head(keys, chosen))) @ values, block)
    middle = (inputs.tokens[0] + detail)[1:]

    def last(tokens: Tensor, middle: Tensor) -> Tensor:
        block = tower().transformer.resblocks[-1]
        _, keys, values = literal_projections(tokens, block)
        weights = [
            (of_similarity(middle) + literal_softmax(self_scores(head(keys, index)))) / 2 for index in range(HEADS)
        ]
        (chosen,) = lowest_entropy(weights, 1)
        return literal_output(weights[chosen] @ values / HEADS, block)

    expected = literal_calibrated(inputs, inputs.tokens[0, 1:], middle, last)
    torch.testing.assert_close(attention(inputs)[0], expected, rtol=0, atol=1e-9)


def test_blocks_of_twelve_are_those_of_the_papers_code():
    """Outputs of 3 to 9, of 8 and of 3: inputs of 4 to 10; DiH-CLIP also runs block 8 on its input."""
    assert list(SCCLIPAttention().earlier_blocks(12)) == list(DiHCLIPAttention().earlier_blocks(12)) == [*range(4, 11)]
    assert list(SCCLIPAttention().earlier_blocks(1)) == []


def test_local_outlier_factors_of_padded_images():
    attention = SCCLIPAttention()
    inputs = make_input(attention, (2, 3), batch=2)
    larger = padded(inputs, (3, 4))
    factors = local_outlier_factors(larger.patches, 30, larger.valid)  # k is 5, all others
    for one, image in zip(factors, inputs.patches, strict=True):
        torch.testing.assert_close(one[larger.valid[0]], literal_factors(image, 5))
    assert (factors[~larger.valid] == 0).all()
    # An image whose valid patches are all alike has no anomaly.
    same = local_outlier_factors(torch.ones(1, 6, 4), 3)
    assert same.isfinite().all() and not largest(same, 0.2).any()


@pytest.mark.parametrize("fraction, expected", [(0.25, [3]), (0.5, [0, 3]), (0.0, [])])
def test_largest(fraction, expected):
    values = torch.tensor([[5.0, 1.0, 3.0, 9.0, 7.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert largest(values, fraction, valid)[0].nonzero().flatten().tolist() == expected


def test_neighbour_means_by_hand():
    tokens = torch.arange(6.0).view(1, 6, 1)  # 0 1 2 / 3 4 5
    replaced = torch.tensor([[False, True, False, False, False, True]])
    out = neighbour_means(tokens, replaced, None, (2, 3))[0, :, 0]
    assert out.tolist() == pytest.approx([0, (0 + 2 + 3 + 4) / 4, 2, 3, 4, (2 + 4) / 2])
    alone = neighbour_means(tokens, torch.ones(1, 6, dtype=torch.bool), None, (2, 3))
    assert torch.equal(alone, tokens)
    valid = torch.tensor([[True, True, True, False, True, True]])
    assert neighbour_means(tokens, replaced, valid, (2, 3))[0, 1, 0] == pytest.approx((0 + 2 + 4) / 3)
