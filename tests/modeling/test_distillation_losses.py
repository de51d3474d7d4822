"""Losses of the distillation stage, Eqs. (8) to (10), against values by hand and loops in float64.

Shape letters: B images, C classes, D width of the joint embedding, (h, w) grids, (H, W) size in pixels.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.modeling.distillation_losses import (
    IGNORE_LABEL,
    distillation_losses,
    feature_guided_loss,
    mask_guided_loss,
    valid_pixels,
)


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
    only = mask_guided_loss(logits, torch.tensor([[[IGNORE_LABEL, 1]]])).item()
    assert only == pytest.approx(math.log(1 + math.exp(-3)))


def test_mask_guided_loss_against_a_loop_with_padding():
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 10, 9))
    labels[1, 7:], labels[1, :, 5:] = IGNORE_LABEL, IGNORE_LABEL
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
    """A class list of a user's own may be longer than 255: that id is no mark of padding."""
    logits = torch.zeros(1, 300, 2, 2)
    labels = torch.full((1, 2, 2), 255)
    assert mask_guided_loss(logits, labels).item() == pytest.approx(math.log(300), rel=1e-6)


def test_an_image_of_padding_alone_adds_nothing():
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    labels = torch.zeros(2, 2, 2, dtype=torch.int64)
    labels[1] = IGNORE_LABEL
    loss = mask_guided_loss(logits, labels)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:1], labels[:1]).item() / 2, rel=1e-6)
    loss.backward()
    assert logits.grad[1].abs().max() == 0


# ---- Eq. (9) ----------------------------------------------------------------------------------------------------


def test_feature_guided_loss_by_hand():
    """Two channels, two pixels, |1 - 0| + |0 - 1| = 2 and |2 - 2| + |5 - 1| = 4; the second is padding or not."""
    student, teacher = torch.tensor([[[[1.0, 2.0]], [[0.0, 5.0]]]]), torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])
    assert feature_guided_loss(student, teacher, torch.tensor([[[True, True]]]), (1, 2)).item() == 3
    assert feature_guided_loss(student, teacher, torch.tensor([[[True, False]]]), (1, 2)).item() == 2


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
    loss = feature_guided_loss(student, teacher, valid, size)
    assert loss.item() == pytest.approx((sum(images) / 2).item(), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: feature_guided_loss(x, teacher, valid, size), (student,))


def test_the_resized_features_are_not_kept():
    """What the backward pass keeps is of the grids' size, not of the image's."""
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    student, teacher = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 2, 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = feature_guided_loss(student, teacher, torch.ones(2, 64, 64, dtype=torch.bool), (64, 64))
    assert max(kept, default=0) <= 64 * 64  # the mask; the features would be 8 times as many
    loss.backward()
    assert student.grad.abs().max() > 0


def test_losses_are_computed_in_full_precision():
    student = torch.randn(1, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feature = feature_guided_loss(student.bfloat16(), student, torch.ones(1, 3, 3, dtype=torch.bool), (3, 3))
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
