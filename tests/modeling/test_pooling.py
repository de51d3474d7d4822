"""Pooling of the hypothesis rows against loops in float64.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) patch grid.
"""

import pytest
import torch
from torch import Tensor

from reclip_d2.layers import draw_seed, gumbel_softmax, use_kernels
from reclip_d2.modeling.pooling import MaskLogits, PooledHypotheses, pack_hypotheses, pool_hypotheses

B, C, D, H, W = 3, 4, 5, 2, 3
F64 = torch.float64
HYPOTHESES = [torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]


def inputs() -> tuple[MaskLogits, Tensor]:
    """M_o with a bias still to be subtracted, and Z."""
    bias = torch.randn(H * W, C, dtype=F64, requires_grad=True)
    logits = torch.randn(B, C, H, W, dtype=F64, requires_grad=True)
    return MaskLogits(logits, bias), torch.randn(B, D, H, W, dtype=F64, requires_grad=True)


def pool(mask_logits: MaskLogits, features: Tensor, valid: Tensor, hard: bool) -> PooledHypotheses:
    torch.manual_seed(3)
    return pool_hypotheses(mask_logits, features, pack_hypotheses(HYPOTHESES), valid, 0.7, hard)


def test_mask_logits_are_a_difference():
    mask_logits, _ = inputs()
    found = mask_logits.tensor()
    for row in range(H):
        for column in range(W):
            expected = mask_logits.logits[..., row, column] - mask_logits.bias[row * W + column]
            assert torch.equal(found[..., row, column], expected)
    assert MaskLogits(found).tensor() is found


def test_hypotheses_are_packed_in_order():
    ids, offsets = pack_hypotheses(HYPOTHESES)
    assert ids.tolist() == [2, 0, 1] and offsets.tolist() == [0, 2, 2, 3]
    assert ids.dtype == offsets.dtype == torch.int64


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("hard", [True, False])
def test_rows_against_loops(hard, kernels):
    """Masked sums over the patches of the image, by the mask's area with its padding."""
    mask_logits, features = inputs()
    valid = torch.ones(B, H * W, dtype=torch.bool)
    valid[0, 4:] = False
    with use_kernels(kernels):
        found = pool(mask_logits, features, valid, hard)
        torch.manual_seed(3)
        masks = gumbel_softmax(mask_logits.tensor().flatten(2).transpose(1, 2), 0.7, hard, draw_seed())
    assert found.class_ids.tolist() == [2, 0, 1] and found.offsets.tolist() == [0, 2, 2, 3]
    assert found.features.shape == (3, D)
    for row, (image, k) in enumerate([(0, 2), (0, 0), (2, 1)]):
        total = torch.zeros(D, dtype=F64)
        for n in range(H * W):
            if valid[image, n]:
                total = total + masks[image, n, k] * features[image, :, n // W, n % W]
        area = masks[image, :, k].sum()
        assert found.area[row].item() == pytest.approx(area.item())
        expected = total / area if area > 0 else total
        torch.testing.assert_close(found.features[row], expected, rtol=1e-9, atol=1e-12)


def test_padding_gets_no_gradient_and_changes_no_row():
    mask_logits, features = inputs()
    valid = torch.ones(B, H * W, dtype=torch.bool)
    valid[2, 1:] = False
    found = pool(mask_logits, features, valid, False)
    found.features.square().sum().backward()
    grads = features.grad.flatten(2)
    assert grads[0].abs().min() > 0 and grads[2, :, 0].abs().min() > 0
    assert torch.equal(grads[2, :, 1:], torch.zeros(D, 5, dtype=F64))
    with torch.no_grad():
        features.flatten(2)[2, :, 1:] = 7.0
    assert torch.equal(pool(mask_logits, features, valid, False).features, found.features)


def test_a_bias_left_to_the_operator_equals_one_subtracted_before():
    mask_logits, features = inputs()
    valid = torch.ones(B, H * W, dtype=torch.bool)
    grads = []
    for given in (mask_logits, MaskLogits(mask_logits.tensor())):
        for tensor in (*mask_logits, features):
            tensor.grad = None
        rows = pool(given, features, valid, False)
        (rows.features.sin().sum() + rows.area.cos().sum()).backward()
        grads.append([tensor.grad for tensor in (*mask_logits, features)])
    for fused, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-13)
