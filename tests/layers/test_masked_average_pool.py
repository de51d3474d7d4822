"""masked_average_pool: values by hand, kernels against the twin, gradients, errors."""

import math

import pytest
import torch

from reclip_d2.layers import masked_average_pool, nonfinite_images, use_kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run(features, masks, class_ids, offsets):
    features, masks = features.detach().requires_grad_(), masks.detach().requires_grad_()
    pooled, area = masked_average_pool(features, masks, class_ids, offsets)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled)
    loss = (pooled * weights).sum() + (area * area).sum()
    return pooled.detach(), area.detach(), *torch.autograd.grad(loss, (features, masks))


def test_values_by_hand(implementation, device):
    features = torch.tensor([[[1.0, 10.0], [3.0, 30.0]], [[5.0, 50.0], [7.0, 70.0]]], device=device)
    masks = torch.tensor([[[0.25, 1.0], [0.75, 0.0]], [[0.5, 0.0], [0.5, 0.0]]], device=device)
    pooled, area = masked_average_pool(features, masks, torch.tensor([1, 0, 0, 1]), torch.tensor([0, 2, 4]))
    assert area.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert pooled.tolist() == [[1.0, 10.0], [2.5, 25.0], [6.0, 60.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("classes", "patches", "width", "rows"),
    [(1, 1, 1, 1), (2, 63, 513, 2), (20, 441, 64, 13), (150, 1025, 512, 94), (1000, 63, 1, 13), (19, 63, 64, 0)],
)
def test_kernels_equal_the_twin(make_sample, kernels, classes, patches, width, rows, dtype):
    sample = make_sample(classes, patches, width, rows, dtype)
    masks = sample.logits.float().softmax(-1).to(dtype)
    actual = run(sample.features, masks, sample.class_ids, sample.offsets)
    with use_kernels(False):
        expected = run(sample.features, masks, sample.class_ids, sample.offsets)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert error < TOLERANCE[dtype]


def test_strided_class_ids(implementation, device):
    features, masks = torch.randn(1, 4, 3, device=device), torch.rand(1, 4, 2, device=device)
    pairs = torch.tensor([[1, 7], [0, 8]])
    got = masked_average_pool(features, masks, pairs[:, 0], torch.tensor([0, 9, 2])[::2])
    want = masked_average_pool(features, masks, torch.tensor([1, 0]), torch.tensor([0, 2]))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradcheck(make_sample, implementation):
    sample = make_sample(4, 6, 3, 2, torch.float64, images=2)
    inputs = (
        sample.features.clone().requires_grad_(),
        sample.logits.softmax(-1).detach().clone().requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda z, m: masked_average_pool(z, m, sample.class_ids, sample.offsets), inputs)


def test_empty_mask_gives_a_zero_row_without_gradient(implementation, device):
    features = torch.randn(1, 4, 3, device=device, requires_grad=True)
    masks = torch.zeros(1, 4, 2, device=device, requires_grad=True)
    pooled, area = masked_average_pool(features, masks, torch.tensor([1]), torch.tensor([0, 1]))
    pooled.sum().backward()
    assert (pooled == 0).all() and (area == 0).all()
    assert (features.grad == 0).all() and (masks.grad == 0).all()


def test_area_too_small_to_divide_by_counts_as_empty(implementation, device):
    features = torch.tensor([[[1.0], [2.0]]], device=device, requires_grad=True)
    masks = torch.tensor([[[3e-31, 3e-30], [6e-31, 1e-30]]], device=device, requires_grad=True)
    pooled, area = masked_average_pool(features, masks, torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert area.tolist() == [0.0, pytest.approx(4e-30)] and pooled.tolist() == [[0.0], [pytest.approx(1.25)]]
    (pooled.sum() + area.sum()).backward()
    assert features.grad.flatten().tolist() == pytest.approx([0.75, 0.25])
    # The area's gradient is 1 everywhere; that of the second row's mean is (z - 1.25) / 4e-30.
    assert masks.grad[0, :, 0].tolist() == [1.0, 1.0]
    assert masks.grad[0, :, 1].tolist() == pytest.approx([-6.25e28, 1.875e29], rel=1e-5)


def test_nan_masks_are_reported_and_pass_no_gradient(implementation, device):
    features = torch.randn(2, 4, 3, device=device)
    masks = torch.rand(2, 4, 2, device=device)
    masks[1, 2] = math.nan
    offsets = torch.tensor([0, 1, 3])
    features, masks = features.requires_grad_(), masks.requires_grad_()
    pooled, area = masked_average_pool(features, masks, torch.tensor([0, 0, 1]), offsets)
    assert nonfinite_images(area, offsets) == [1]
    assert pooled[1:].isnan().all() and pooled[0].isfinite().all()
    pooled.nan_to_num().sum().backward()
    assert (features.grad[1] == 0).all() and (masks.grad[1] == 0).all()


def test_indices_may_lie_on_the_device(make_sample, implementation, device):
    sample = make_sample(5, 9, 4, 2)
    masks = sample.logits.softmax(-1)
    moved = masked_average_pool(sample.features, masks, sample.class_ids.to(device), sample.offsets.to(device))
    stayed = masked_average_pool(sample.features, masks, sample.class_ids, sample.offsets)
    assert torch.equal(moved[0], stayed[0])


def test_operator_contract(make_sample, kernels):
    sample = make_sample(5, 7, 3, 2)
    features = sample.features.clone().requires_grad_()
    masks = sample.logits.softmax(-1).detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.reclip_d2.masked_average_pool, (features, masks, sample.class_ids, sample.offsets))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "differ in .B,n.", {"features": torch.zeros(2, 5, 3)}),
        (ValueError, "`masks` must have shape", {"masks": torch.zeros(2, 4)}),
        (TypeError, "`features` must be float64", {"features": torch.zeros(2, 4, 3, dtype=torch.int32)}),
        (ValueError, "there are 6 classes", {"class_ids": torch.tensor([6, 1])}),
        (ValueError, "there are 6 classes", {"class_ids": torch.tensor([-1, 1])}),
        (ValueError, "`offsets` must rise", {"offsets": torch.tensor([0, 1, 3])}),
    ],
)
def test_wrong_arguments_give_one_clear_line(implementation, device, error, message, change):
    arguments = {
        "features": torch.zeros(2, 4, 3),
        "masks": torch.zeros(2, 4, 6),
        "class_ids": torch.tensor([0, 1]),
        "offsets": torch.tensor([0, 1, 2]),
        **change,
    }
    for name in ("features", "masks"):
        arguments[name] = arguments[name].to(device)
    with pytest.raises(error, match=message) as caught:
        masked_average_pool(**arguments)
    assert "\n" not in str(caught.value)
