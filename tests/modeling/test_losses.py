"""Equation (7) and the two terms that are not in the paper against loops in float64.

Shape letters: B images, n patches, C classes, D joint embedding, K hypothesis rows.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.modeling.losses import (
    contrastive_loss,
    coverage_loss,
    hypothesis_mask,
    outside_hypothesis_penalty,
)
from reclip_d2.modeling.pooling import PooledHypotheses

F64 = torch.float64


def literal_contrastive(pooled, area, query, class_ids, offsets, tau) -> float:
    """Eq. (7) image by image, class by class."""
    images = []
    for b in range(len(offsets) - 1):
        rows = range(offsets[b], offsets[b + 1])
        terms = []
        for r in rows:
            if area[r] == 0:
                continue
            similarity = [torch.cosine_similarity(pooled[r], query[j], dim=0).item() / tau for j in range(len(query))]
            terms.append(math.log(sum(math.exp(s) for s in similarity)) - similarity[class_ids[r]])
        images.append(sum(terms) / len(rows) if len(rows) else 0.0)
    return sum(images) / len(images)


@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("offsets", [[0, 5], [0, 1, 5], [0, 3, 3, 5], [0, 0, 5]])
def test_equation_7(tau, offsets):
    pooled = torch.randn(5, 6, dtype=F64)
    query = F.normalize(torch.randn(4, 6, dtype=F64), dim=1)
    area = torch.tensor([1.0, 2.5, 3.0, 0.25, 1.0], dtype=F64)
    class_ids = torch.tensor([0, 3, 1, 2, 0])
    got = contrastive_loss(PooledHypotheses(pooled, area, class_ids, torch.tensor(offsets)), query, tau)
    assert got.item() == pytest.approx(literal_contrastive(pooled, area, query, class_ids, offsets, tau), rel=1e-9)


def test_each_image_weighs_the_same_however_large_its_hypothesis():
    """Image 0 has one row of loss a, image 1 has three of loss b: the mean is (a + b) / 2."""
    query = torch.eye(2, dtype=F64)
    pooled = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=F64)
    class_ids = torch.tensor([0, 0, 1, 0])
    rows = PooledHypotheses(pooled, torch.ones(4, dtype=F64), class_ids, torch.tensor([0, 1, 4]))
    got = contrastive_loss(rows, query, 1.0)
    assert got.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2, rel=1e-12)


def test_an_empty_mask_adds_no_loss_and_no_gradient_but_is_counted():
    query = F.normalize(torch.randn(3, 4, dtype=F64), dim=1)
    pooled = torch.randn(2, 4, dtype=F64)
    pooled[1] = 0
    pooled.requires_grad_()
    area = torch.tensor([2.0, 0.0], dtype=F64)
    loss = contrastive_loss(PooledHypotheses(pooled, area, torch.tensor([0, 1]), torch.tensor([0, 2])), query, 0.1)
    loss.backward()
    first = PooledHypotheses(pooled[:1], area[:1], torch.tensor([0]), torch.tensor([0, 1]))
    alone = contrastive_loss(first, query, 0.1)
    assert loss.item() == pytest.approx(alone.item() / 2)
    assert torch.equal(pooled.grad[1], torch.zeros(4, dtype=F64))
    assert pooled.grad[0].abs().max() > 0


def test_no_row_at_all():
    pooled = torch.zeros(0, 4, requires_grad=True)
    rows = PooledHypotheses(pooled, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0, 0]))
    loss = contrastive_loss(rows, torch.eye(4), 0.1)
    loss.backward()
    assert loss.item() == 0.0 and pooled.grad.shape == (0, 4)


def test_not_a_number_is_not_hidden():
    """The operators report a bad image by a NaN area; the loss must not turn it into 0."""
    query = torch.eye(3)
    pooled = torch.tensor([[float("nan")] * 3, [1.0, 0.0, 0.0]])
    area = torch.tensor([float("nan"), 1.0])
    loss = contrastive_loss(PooledHypotheses(pooled, area, torch.tensor([0, 1]), torch.tensor([0, 1, 2])), query, 0.1)
    assert not torch.isfinite(loss)


def test_gradient_of_equation_7():
    query = F.normalize(torch.randn(3, 4, dtype=F64), dim=1)
    pooled = torch.randn(3, 4, dtype=F64, requires_grad=True)
    area, class_ids, offsets = torch.ones(3, dtype=F64), torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda x: contrastive_loss(PooledHypotheses(x, area, class_ids, offsets), query, 0.2), [pooled]
    )


def test_hypothesis_mask():
    got = hypothesis_mask(torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2, 3]), 3)
    expected = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    assert torch.equal(got, expected)
    empty = hypothesis_mask(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]), 2)
    assert torch.equal(empty, torch.zeros(1, 2, dtype=torch.bool))


# ---- not in the paper -----------------------------------------------------------------------------------------


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Three images: the second has padding, the third no hypothesis."""
    logits = torch.randn(3, 5, 4, dtype=F64)
    inside = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1, 3:] = False
    return logits, inside, valid


def literal_terms(logits, inside, valid, tau) -> tuple[float, float]:
    """Coverage loss and outside penalty, patch by patch."""
    coverage, outside, count = 0.0, 0.0, 0
    for b in range(len(logits)):
        for n in range(logits.shape[1]):
            if not valid[b, n]:
                continue
            count += 1
            if not inside[b].any():
                continue
            exponentials = [math.exp(x / tau) for x in logits[b, n].tolist()]
            mass = sum(e for e, own in zip(exponentials, inside[b].tolist(), strict=True) if own) / sum(exponentials)
            coverage -= math.log(mass)
            outside += 1 - mass
    return coverage / count, outside / count


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_terms_against_loops(tau):
    logits, inside, valid = scene()
    coverage, outside = literal_terms(logits, inside, valid, tau)
    assert coverage_loss(logits, inside, valid, tau).item() == pytest.approx(coverage, rel=1e-5)
    assert outside_hypothesis_penalty(logits, inside, valid, tau).item() == pytest.approx(outside, rel=1e-5)


@pytest.mark.parametrize("loss", [coverage_loss, outside_hypothesis_penalty])
def test_terms_give_no_gradient_to_padding_and_to_images_without_hypothesis(loss):
    logits, inside, valid = scene()
    logits.requires_grad_()
    loss(logits, inside, valid, 0.5).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().min() > 0
    assert torch.equal(logits.grad[1, 3:], torch.zeros(2, 4, dtype=F64))
    assert torch.equal(logits.grad[2], torch.zeros(5, 4, dtype=F64))


@pytest.mark.parametrize("loss", [coverage_loss, outside_hypothesis_penalty])
def test_terms_vanish_when_all_mass_is_inside(loss):
    logits = torch.zeros(1, 2, 3)
    logits[..., 1] = 50
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert loss(logits, torch.tensor([[False, True, False]]), valid, 1.0).item() == pytest.approx(0, abs=1e-6)
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert loss(torch.randn(1, 2, 3), everything, valid, 1.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [coverage_loss, outside_hypothesis_penalty])
def test_terms_without_a_valid_patch_or_a_hypothesis(loss):
    logits = torch.randn(2, 3, 4, requires_grad=True)
    inside = torch.zeros(2, 4, dtype=torch.bool)
    value = loss(logits, inside, torch.ones(2, 3, dtype=torch.bool), 0.1)
    value.backward()
    assert value.item() == 0 and torch.isfinite(logits.grad).all()
    inside[:, 0] = True
    assert loss(logits, inside, torch.zeros(2, 3, dtype=torch.bool), 0.1).item() == 0


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    inside = torch.tensor([[False, True, False]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    value = coverage_loss(logits, inside, valid, 1.0)
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert torch.isfinite(logits.grad).all()
    assert outside_hypothesis_penalty(logits.detach(), inside, valid, 1.0).item() == pytest.approx(1.0)
