"""Equations (7) to (10), and the three terms that are not in the paper, by hand and against loops in float64.

Shape letters: B images, n patches, C classes, D width of the joint embedding, K hypothesis rows, (h, w) grids, (H, W)
size in pixels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.modeling.losses import (
    NO_PSEUDO_LABEL,
    anchor_loss,
    contrastive_loss,
    coverage_loss,
    distillation_losses,
    feature_guided_loss,
    hypothesis_mask,
    mask_guided_loss,
    outside_hypothesis_penalty,
    valid_pixels,
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


def test_anchor_against_a_loop():
    logits, _, valid = scene()
    query_logits, tau, scale = logits.flip(2) * 0.1 + 0.05, 0.3, 20.0
    total, count = 0.0, 0
    for b, n in valid.nonzero().tolist():
        own = [math.exp(scale * x) for x in query_logits[b, n].tolist()]
        label = own.index(max(own))
        masks = [math.exp(x / tau) for x in logits[b, n].tolist()]
        total -= max(own) / sum(own) * math.log(masks[label] / sum(masks))
        count += 1
    loss = anchor_loss(logits.requires_grad_(), query_logits.requires_grad_(), valid, tau, scale)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    loss.backward()
    assert query_logits.grad is None and torch.equal(logits.grad[~valid], torch.zeros_like(logits.grad[~valid]))


def test_anchor_vanishes_at_confident_labels():
    query_logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert anchor_loss(query_logits * 10, query_logits, valid, 1.0, 10.0).item() == pytest.approx(0, abs=1e-6)
    # Of the other label: 90, the difference of the logits, with a confidence of 1.
    wrong = query_logits[..., [1, 0, 2]] * 10
    assert anchor_loss(wrong, query_logits, valid, 1.0, 10.0).item() == pytest.approx(90, rel=1e-5)


# ---- distillation ---------------------------------------------------------------------------------------------------


def bilinear(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """``(..., h, w)`` to ``(..., height, width)`` by matrices of weights; pixel centres at half integers."""

    def weights(old: int, new: int) -> torch.Tensor:
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            position = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = min(int(position), old - 1)
            high, part = min(low + 1, old - 1), position - low
            matrix[i, low] += 1 - part
            matrix[i, high] += part
        return matrix

    return weights(x.shape[-2], height) @ x.double() @ weights(x.shape[-1], width).T


# ---- Eq. (8) ----------------------------------------------------------------------------------------------------


def test_mask_guided_loss_by_hand():
    """Two pixels, two classes: -log softmax(1, 0)[0] and -log softmax(0, 3)[0]."""
    logits = torch.tensor([[[[1.0, 0.0]], [[0.0, 3.0]]]])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert mask_guided_loss(logits, torch.zeros(1, 1, 2, dtype=torch.int64)).item() == pytest.approx(expected)
    only = mask_guided_loss(logits, torch.tensor([[[NO_PSEUDO_LABEL, 1]]])).item()
    assert only == pytest.approx(math.log(1 + math.exp(-3)))


def test_mask_guided_loss_against_a_loop_with_padding():
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 10, 9))
    labels[1, 7:], labels[1, :, 5:] = NO_PSEUDO_LABEL, NO_PSEUDO_LABEL
    loss = mask_guided_loss(logits, labels)
    probabilities = bilinear(logits.detach(), 10, 9).softmax(1)
    images = []
    for b in range(2):
        pixels = [(i, j) for i in range(10) for j in range(9) if labels[b, i, j] >= 0]
        images.append(-sum(probabilities[b, labels[b, i, j], i, j].log() for i, j in pixels) / len(pixels))
    assert len(pixels) == 35  # the padded image counts as much as the other
    assert loss.item() == pytest.approx((sum(images) / 2).item(), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: mask_guided_loss(x, labels), (logits,))


def test_class_255_is_a_class():
    """A user's class list may be longer than 255: that id does not mark padding."""
    logits = torch.zeros(1, 300, 2, 2)
    labels = torch.full((1, 2, 2), 255)
    assert mask_guided_loss(logits, labels).item() == pytest.approx(math.log(300), rel=1e-6)


def test_an_image_of_padding_alone_adds_nothing():
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    labels = torch.zeros(2, 2, 2, dtype=torch.int64)
    labels[1] = NO_PSEUDO_LABEL
    loss = mask_guided_loss(logits, labels)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:1], labels[:1]).item() / 2, rel=1e-6)
    loss.backward()
    assert logits.grad[1].abs().max() == 0


# ---- Eq. (9) ----------------------------------------------------------------------------------------------------


def test_feature_guided_loss_by_hand():
    """Two channels, two pixels, |1 - 0| + |0 - 1| = 2 and |2 - 2| + |5 - 1| = 4; the second is padding or not."""
    student, teacher = torch.tensor([[[[1.0, 2.0]], [[0.0, 5.0]]]]), torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])
    assert feature_guided_loss(student, teacher, torch.tensor([[[True, True]]])).item() == 3
    assert feature_guided_loss(student, teacher, torch.tensor([[[True, False]]])).item() == 2


@pytest.mark.parametrize("size", [(12, 10), (4, 5)], ids=["image", "student's grid"])
def test_feature_guided_loss_against_a_loop_with_padding(size):
    student = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    valid = torch.ones(2, *size, dtype=torch.bool)
    valid[1, size[0] // 2 :], valid[1, :, 3:] = False, False
    ours, theirs = bilinear(student.detach(), *size), bilinear(teacher, *size)
    images = []
    for b in range(2):
        pixels = [(i, j) for i in range(size[0]) for j in range(size[1]) if valid[b, i, j]]
        distances = [sum(abs(ours[b, d, i, j] - theirs[b, d, i, j]) for d in range(3)) for i, j in pixels]
        images.append(sum(distances) / len(pixels))
    loss = feature_guided_loss(student, teacher, valid)
    assert loss.item() == pytest.approx((sum(images) / 2).item(), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: feature_guided_loss(x, teacher, valid), (student,))


def test_the_resized_features_are_not_kept():
    """What the backward pass keeps is of the grids' size, not of the image's."""
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    student, teacher = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 2, 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = feature_guided_loss(student, teacher, torch.ones(2, 64, 64, dtype=torch.bool))
    assert max(kept, default=0) <= 2 * 64 * 64  # the mask; the features would be 8 times as many
    loss.backward()
    assert student.grad.abs().max() > 0


def test_losses_are_computed_in_full_precision():
    student = torch.randn(1, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feature = feature_guided_loss(student.bfloat16(), student, torch.ones(1, 3, 3, dtype=torch.bool))
        mask = mask_guided_loss(student.bfloat16(), torch.zeros(1, 6, 6, dtype=torch.int64))
    assert feature.dtype == mask.dtype == torch.float32


# ---- Eq. (10) ---------------------------------------------------------------------------------------------------


def test_weights():
    terms = {"mask": torch.tensor(2.0), "feature": torch.tensor(3.0), "text": torch.tensor(5.0)}
    paper = distillation_losses(terms)
    assert {key: value.item() for key, value in paper.items()} == {
        "loss_mask": 2.0,
        "loss_feature": 1.5,
        "loss_text": 2.5,
    }
    other = distillation_losses(terms, mask_weight=0.5, alpha=2.0, beta=0.1)
    assert sum(other.values()).item() == pytest.approx(0.5 * 2 + 2 * 3 + 0.1 * 5)
    assert set(distillation_losses({"mask": terms["mask"]})) == {"loss_mask"}


def test_valid_pixels():
    valid = valid_pixels([(2, 3), (3, 4)], (3, 4), torch.device("cpu"))
    assert valid.tolist() == [[[True] * 3 + [False]] * 2 + [[False] * 4], [[True] * 4] * 3]
