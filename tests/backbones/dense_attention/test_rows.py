"""Attention by blocks of rows: the same numbers in bounded memory."""

import pytest
import torch

from reclip_d2.backbones.dense_attention import rows
from reclip_d2.backbones.dense_attention.rows import (
    attend,
    attend_and_add,
    mean_similarity,
    mix,
    row_blocks,
    softmax_of_positive,
)


def test_blocks_cover_all_rows_within_the_limit(monkeypatch):
    monkeypatch.setattr(rows, "MAX_SCORES", 50)
    assert [(one.start, one.stop) for one in row_blocks(10, 12)] == [(0, 4), (4, 8), (8, 10)]
    assert [(one.start, one.stop) for one in row_blocks(2, 99)] == [(0, 1), (1, 2)]  # at least one
    assert list(row_blocks(0, 5)) == []


def test_blocks_give_the_same_as_all_rows_at_once(monkeypatch):
    query, key, value = (torch.randn(2, 3, count, 4, dtype=torch.float64) for count in (7, 9, 9))
    bias = torch.randn(7, 9, dtype=torch.float64)
    valid = torch.rand(2, 9) > 0.3
    valid[:, 0] = True
    scores = query @ key.transpose(2, 3) / 2 + bias
    expected = scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1) @ value
    for limit in (2**20, 100):
        monkeypatch.setattr(rows, "MAX_SCORES", limit)
        torch.testing.assert_close(attend(query, key, value, valid, lambda one: bias[one]), expected)
        torch.testing.assert_close(
            mix(query[:, 0], key[:, 0], value[:, 0], lambda s, one: s / 2 + bias[one]),
            (query[:, 0] @ key[:, 0].mT / 2 + bias) @ value[:, 0],
        )


def test_blocks_on_a_cpu_fit_its_cache(monkeypatch):
    monkeypatch.setattr(rows, "CACHED_SCORES", 30)
    assert [(one.start, one.stop) for one in row_blocks(5, 10, torch.device("cpu"))] == [(0, 3), (3, 5)]
    assert list(row_blocks(5, 10, torch.device("cuda"))) == list(row_blocks(5, 10)) == [slice(0, 5)]


@pytest.mark.parametrize("limit", [2**20, 50])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_weights_are_added_up(monkeypatch, first, limit):
    """With blocks of one row, too, of which the first are not counted."""
    monkeypatch.setattr(rows, "CACHED_SCORES", limit)
    query, key, value = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    weights = (query @ key.transpose(2, 3) / 2).softmax(-1)
    total = torch.ones(2, 3, 9 - first, 9, dtype=torch.float64)
    torch.testing.assert_close(attend_and_add(query, key, value, total, first), weights @ value)
    torch.testing.assert_close(total, 1 + weights[:, :, first:])


def test_softmax_of_positive_by_hand():
    weights = softmax_of_positive(torch.tensor([[[0.0, -1.0, 1.0], [-3.0, -2.0, -4.0]]]))
    e = 2.718281828
    torch.testing.assert_close(weights, torch.tensor([[[1 / (1 + e), 0, e / (1 + e)], [0.0, 1.0, 0.0]]]))
    one = softmax_of_positive(torch.tensor([[[0.0, 5.0]]]), torch.tensor([[True, False]]))
    assert one.tolist() == [[[1.0, 0.0]]]
    assert softmax_of_positive(torch.ones(1, 1, 2), torch.zeros(1, 2, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("valid", [None, torch.tensor([[True, False, True, True]])])
def test_mean_similarity_is_the_mean_over_pairs(valid):
    unit = torch.nn.functional.normalize(torch.randn(1, 4, 6, dtype=torch.float64), dim=-1)
    kept = unit[0] if valid is None else unit[0][valid[0]]
    torch.testing.assert_close(mean_similarity(unit, valid), (kept @ kept.T).mean().view(1, 1, 1))
