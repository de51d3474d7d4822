"""upsample_argmax: against interpolation and argmax in PyTorch, ties, non-finite scores, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.layers import upsample_argmax


def agrees(labels, logits, size):
    """Every label is a class whose interpolated score is the largest, up to rounding."""
    scores = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    top = scores.amax(1)
    chosen = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    tolerance = 1e-12 if logits.dtype == torch.float64 else 2e-6
    return bool((chosen >= top - tolerance * top.abs().clamp(min=1)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("classes", "grid", "size"),
    [
        (1, (3, 4), (7, 9)),
        (2, (1, 1), (5, 3)),
        (19, (21, 32), (84, 63)),
        (27, (5, 1), (17, 33)),
        (150, (32, 32), (32, 32)),
        (171, (9, 13), (101, 67)),
        (1000, (7, 7), (29, 31)),
        (20, (33, 47), (10, 12)),
        (20, (4, 4), (1, 1)),
        (1, (1, 1), (8, 9)),  # from here on at least eightfold: other kernels on a GPU
        (21, (3, 4), (24, 32)),
        (150, (5, 6), (77, 61)),
        (171, (4, 4), (64, 75)),
        (450, (2, 9), (37, 73)),
    ],
)
def test_equals_interpolation_and_argmax(implementation, device, classes, grid, size, dtype):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, *grid, generator=generator).to(device, dtype)
    labels = upsample_argmax(logits, size)
    assert labels.dtype == torch.int64 and labels.shape == (2, *size)
    assert agrees(labels, logits, size)


def test_smooth_logits(implementation, device):
    coarse = torch.randn(1, 59, 4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    logits = F.interpolate(coarse, size=(24, 31), mode="bilinear")
    assert agrees(upsample_argmax(logits, (200, 301)), logits, (200, 301))


def test_values_by_hand(implementation, device):
    # Class 0 falls from 3 to 0 and class 1 rises from 0 to 1 along x; they cross at 3/4 of the way.
    logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]], device=device)
    # Eight pixels lie at -3/8, -1/8, 1/8, 3/8, ... of the way; beyond the ends the end's value holds.
    assert upsample_argmax(logits, (1, 8)).tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1]]]


@pytest.mark.parametrize("size", [(11, 13), (29, 50)])
def test_ties_go_to_the_lowest_class(implementation, device, size):
    logits = torch.zeros(1, 237, 3, 3, device=device)  # zeros: interpolated without rounding
    logits[:, 0] = -1.0
    assert (upsample_argmax(logits, size) == 1).all()


def test_any_memory_layout(implementation, device):
    logits = torch.randn(2, 19, 6, 5, device=device)
    expected = upsample_argmax(logits, (30, 21))
    assert torch.equal(upsample_argmax(logits.to(memory_format=torch.channels_last), (30, 21)), expected)
    wide = torch.zeros(2, 38, 12, 5, device=device)
    wide[:, ::2, 1::2] = logits
    assert torch.equal(upsample_argmax(wide[:, ::2, 1::2], (30, 21)), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("classes", "size"), [(5, (40, 40)), (250, (70, 91))])
def test_nonfinite_scores_are_marked_where_they_reach(implementation, device, value, classes, size):
    logits = torch.randn(2, classes, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    clean = upsample_argmax(logits, size)
    logits[1, 3, 2, 6] = value
    reached = F.interpolate(logits, size=size, mode="bilinear").isfinite().logical_not().any(1)
    labels = upsample_argmax(logits, size)
    assert reached.any() and not reached[0].any()
    assert torch.equal(labels, torch.where(reached, -1, clean))


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_thread_count_does_not_matter(kernels, device):
    logits = torch.randn(2, 19, 9, 9, device=device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = upsample_argmax(logits, (50, 70))
        torch.set_num_threads(4)
        assert torch.equal(upsample_argmax(logits, (50, 70)), first)
    finally:
        torch.set_num_threads(before)


def test_operator_contract_and_compilation(kernels, device):
    logits = torch.randn(2, 5, 3, 4, device=device)
    torch.library.opcheck(torch.ops.reclip_d2.upsample_argmax, (logits, 6, 7))
    torch._dynamo.reset()
    compiled = torch.compile(upsample_argmax, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, (6, 7)), upsample_argmax(logits, (6, 7)))


def test_empty_batch(implementation, device):
    assert upsample_argmax(torch.zeros(0, 3, 4, 4, device=device), (8, 8)).shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`logits` must have shape .B,C,h,w.", (torch.zeros(3, 4, 4), (8, 8))),
        (TypeError, "`logits` must be float64", (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (8, 8))),
        (ValueError, "must have classes and a grid", (torch.zeros(1, 0, 4, 4), (8, 8))),
        (ValueError, "`size` must be .H,W.", (torch.zeros(1, 3, 4, 4), (8, 0))),
        (ValueError, "`size` must be .H,W.", (torch.zeros(1, 3, 4, 4), (8,))),
    ],
)
def test_wrong_arguments_give_one_clear_line(error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        upsample_argmax(*arguments)
    assert "\n" not in str(caught.value)
