"""upsample_l1: against interpolation in float64, by hand, masks, layouts, mixed types, non-finite values, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.layers import upsample_l1, upsample_l1_reference

SHAPES = [  # D, student's grid, teacher's grid, size
    (1, (1, 1), (2, 3), (5, 3)),
    (5, (3, 4), (2, 7), (11, 9)),
    (16, (8, 8), (8, 8), (8, 8)),
    (33, (20, 21), (30, 31), (9, 7)),
    (64, (5, 1), (1, 6), (17, 33)),
    (70, (33, 9), (4, 9), (33, 70)),
    (200, (4, 4), (3, 2), (1, 1)),
    (18, (17, 18), (9, 8), (67, 73)),  # several blocks of the gradient
]


def inputs(channels, grid, other, size, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(channels)
    student = torch.randn(3, channels, *grid, generator=generator, dtype=torch.float64).to(device, dtype)
    teacher = torch.randn(3, channels, *other, generator=generator, dtype=torch.float64).to(device, dtype)
    valid = torch.rand(3, *size, generator=generator) > 0.3
    valid[2] = False
    return student.requires_grad_(), teacher.requires_grad_(), valid.to(device)


def expected(student, teacher, valid):
    """In float64, all at once."""
    student, teacher = (
        F.interpolate(x, size=valid.shape[1:], mode="bilinear", align_corners=False) for x in (student, teacher)
    )
    return ((student - teacher).abs().sum(1) * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def with_gradients(function, student, teacher, valid):
    loss = function(student, teacher, valid)
    weights = torch.tensor([0.3, -1.0, 2.0], device=loss.device, dtype=loss.dtype)[: len(loss)]
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), (student, teacher))


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("channels", "grid", "other", "size"), SHAPES)
def test_equals_the_twin(kernels, device, channels, grid, other, size, dtype):
    sample = inputs(channels, grid, other, size, device, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    ours, twins = with_gradients(upsample_l1, *sample), with_gradients(upsample_l1_reference, *sample)
    assert [x.dtype for x in ours] == [x.dtype for x in twins]
    assert max(map(error, ours, twins)) <= tolerance
    assert ours[0][2] == 0 and ours[1][2].abs().max() == 0  # no valid pixel


def test_many_pixels_in_a_cell(kernels, device):
    """So many that CUDA kernels compute their positions again."""
    sample = inputs(2, (1, 2), (2, 1), (90, 181), device, torch.float64)
    ours, twins = with_gradients(upsample_l1, *sample), with_gradients(upsample_l1_reference, *sample)
    assert max(map(error, ours, twins)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "grid", "other", "size"), SHAPES)
def test_half_types_are_as_exact_as_pytorch(kernels, device, channels, grid, other, size, dtype):
    sample = inputs(channels, grid, other, size, device, dtype)
    truth = with_gradients(expected, *(x.detach().double().requires_grad_() for x in sample[:2]), sample[2])
    ours, twins = with_gradients(upsample_l1, *sample), with_gradients(upsample_l1_reference, *sample)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for got, twin, want in zip(ours, twins, truth, strict=True):
        assert error(got, want) <= 2 * error(twin, want) + 1e-6


def test_values_by_hand(implementation, device):
    # Four pixels lie at 0, 2, 6, 8 along x. The teacher is 3: distances 3, 1, 3, 5; the last does not count.
    student = torch.tensor([[[[0.0, 8.0]]]], device=device, requires_grad=True)
    valid = torch.tensor([[[True, True, True, False]]], device=device)
    loss = upsample_l1(student, torch.full((1, 1, 1, 1), 3.0, device=device), valid)
    assert loss.tolist() == [pytest.approx(7 / 3)]
    loss.backward()  # signs -, -, +: weights (1, 3/4, 1/4) of the left column and (0, 1/4, 3/4) of the right
    assert student.grad.flatten().tolist() == pytest.approx([-1.5 / 3, 0.5 / 3])


def test_equal_maps_have_no_gradient(implementation, device):
    student = torch.randn(1, 20, 4, 5, device=device, requires_grad=True)
    loss = upsample_l1(student, student.detach().clone(), torch.ones(1, 9, 17, dtype=torch.bool, device=device))
    loss.sum().backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("size", [(7, 9), (2, 2)])
def test_gradcheck(kernels, device, size):
    student, teacher, valid = inputs(3, (3, 4), (2, 5), size, device, torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: upsample_l1(x, y, valid), (student, teacher))


def test_any_memory_layout_and_mixed_types(kernels, device):
    student, teacher, valid = inputs(37, (5, 6), (4, 3), (20, 23), device)
    want = with_gradients(upsample_l1, student, teacher, valid)
    tokens = teacher.detach().flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (4, 3))
    wide = torch.zeros(3, 74, 10, 6, device=device)
    wide[:, ::2, 1::2] = student.detach()
    other = with_gradients(upsample_l1, wide[:, ::2, 1::2].requires_grad_(), tokens.requires_grad_(), valid)
    for got, expect in zip(other, want, strict=True):
        torch.testing.assert_close(got, expect, rtol=1e-6, atol=1e-7)
    half = teacher.detach().bfloat16().requires_grad_()
    mixed = with_gradients(upsample_l1, student, half, valid)
    assert mixed[1].dtype == torch.float32 and mixed[2].dtype == torch.bfloat16
    same = with_gradients(upsample_l1, student, half.detach().float().requires_grad_(), valid)
    assert torch.equal(mixed[0], same[0]) and torch.equal(mixed[1], same[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_values_show_in_their_image(implementation, device, value):
    student, teacher, valid = inputs(5, (4, 4), (4, 4), (9, 9), device)
    valid[:] = True
    with torch.no_grad():
        student[1, 3, 2, 2] = value
    assert upsample_l1(student, teacher, valid).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_thread_count_does_not_matter(kernels, device):
    sample = inputs(70, (9, 7), (5, 6), (50, 41), device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = with_gradients(upsample_l1, *sample)
        torch.set_num_threads(5)
        assert all(map(torch.equal, with_gradients(upsample_l1, *sample), first))
    finally:
        torch.set_num_threads(before)


def test_operator_contract_and_compilation(kernels, device):
    student, teacher, valid = inputs(5, (3, 4), (2, 3), (6, 7), device)
    torch.library.opcheck(torch.ops.reclip_d2.upsample_l1, (student, teacher, valid))
    torch._dynamo.reset()
    compiled = torch.compile(upsample_l1, fullgraph=True, backend="aot_eager")
    ours = with_gradients(compiled, student, teacher, valid)
    assert all(map(torch.equal, ours, with_gradients(upsample_l1, student, teacher, valid)))


def test_empty_batch(implementation, device):
    none = torch.zeros(0, 3, 4, 4, device=device)
    assert upsample_l1(none, none, torch.zeros(0, 8, 8, dtype=torch.bool, device=device)).shape == (0,)


GRID, VALID = torch.zeros(2, 3, 4, 4), torch.ones(2, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`student` must have shape .B,C,h,w.", (GRID[0], GRID, VALID)),
        (TypeError, "`teacher` must be float64, float32", (GRID, GRID.int(), VALID)),
        (TypeError, "float64 does not mix", (GRID, GRID.double(), VALID)),
        (ValueError, "differ in D", (GRID, GRID[:, :2], VALID)),
        (ValueError, "must have channels and a grid", (GRID[:, :0], GRID[:, :0], VALID)),
        (TypeError, "`valid` must be torch.bool", (GRID, GRID, VALID.float())),
        (ValueError, "`valid` must be .B,H,W. with B = 2", (GRID, GRID, VALID[:1])),
        (ValueError, "`valid` must be .B,H,W. with B = 2", (GRID, GRID, VALID[:, :0])),
    ],
)
def test_wrong_arguments_give_one_clear_line(error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        upsample_l1(*arguments)
    assert "\n" not in str(caught.value)
