"""upsample_cross_entropy: against interpolation and cross entropy in PyTorch, by hand, layouts, bad labels, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.layers import upsample_cross_entropy, upsample_cross_entropy_reference

SHAPES = [  # C, grid, size
    (1, (3, 4), (7, 9)),
    (2, (1, 1), (5, 3)),
    (19, (21, 32), (40, 63)),
    (27, (5, 1), (17, 33)),
    (65, (12, 12), (12, 12)),
    (150, (9, 13), (31, 37)),
    (300, (7, 7), (5, 3)),
    (20, (4, 4), (1, 1)),
    (18, (17, 18), (67, 73)),  # several blocks of the gradient
]


def inputs(classes, grid, size, device, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3, classes, *grid, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(-1, classes, (3, *size), generator=generator)
    labels[2] = -1
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


def expected(logits, labels):
    """In float64, with the probabilities of the labels."""
    scores = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    chosen = scores.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    valid = labels >= 0
    return -(chosen * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def with_gradient(function, logits, labels):
    loss = function(logits, labels)
    weights = torch.tensor([0.3, -1.0, 2.0], device=loss.device, dtype=loss.dtype)[: len(loss)]
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), logits)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("classes", "grid", "size"), SHAPES)
def test_equals_the_twin(kernels, device, classes, grid, size, dtype):
    sample = inputs(classes, grid, size, device, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    ours, twins = (
        with_gradient(upsample_cross_entropy, *sample),
        with_gradient(upsample_cross_entropy_reference, *sample),
    )
    assert [x.dtype for x in ours] == [x.dtype for x in twins]
    assert max(map(error, ours, twins)) <= tolerance
    assert ours[0][2] == 0 and ours[1][2].abs().max() == 0  # no label


def test_many_pixels_in_a_cell(kernels, device):
    """So many that CUDA kernels compute their positions again."""
    sample = inputs(2, (1, 2), (1200, 3), device, torch.float64)
    ours, twins = (
        with_gradient(upsample_cross_entropy, *sample),
        with_gradient(upsample_cross_entropy_reference, *sample),
    )
    assert max(map(error, ours, twins)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("classes", "grid", "size"), SHAPES)
def test_half_types_are_as_exact_as_pytorch(kernels, device, classes, grid, size, dtype):
    sample = inputs(classes, grid, size, device, dtype)
    truth = with_gradient(expected, sample[0].detach().double().requires_grad_(), sample[1])
    ours, twins = (
        with_gradient(upsample_cross_entropy, *sample),
        with_gradient(upsample_cross_entropy_reference, *sample),
    )
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for got, twin, want in zip(ours, twins, truth, strict=True):
        assert error(got, want) <= 2 * error(twin, want) + 1e-6


def test_values_by_hand(implementation, device):
    # Class 0 is 0, class 1 rises from 0 to 4 along x: at the four pixels 0, 1, 3, 4. The third has no label.
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 4.0]]]], device=device, requires_grad=True)
    loss = upsample_cross_entropy(logits, torch.tensor([[[0, 1, -1, 1]]], device=device))
    terms = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-4))]
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-6)
    loss.backward()
    p = [1 / 2, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-4))]  # of class 1; residuals p, p - 1, p - 1
    left = (p[0] + 0.75 * (p[1] - 1)) / 3
    right = (0.25 * (p[1] - 1) + (p[2] - 1)) / 3
    assert logits.grad.flatten().tolist() == pytest.approx([-left, -right, left, right], rel=1e-5)


def test_confident_pixels_keep_their_digits(kernels, device):
    """Logits of hundreds whose largest class is the label: the residual is softmax - 1, nearly 0 everywhere."""
    logits = torch.randn(1, 20, 6, 6, generator=torch.Generator().manual_seed(0)).to(device) * 100
    labels = F.interpolate(logits, (45, 47), mode="bilinear").argmax(1)
    loss, gradient = with_gradient(upsample_cross_entropy, logits.requires_grad_(), labels)
    twin_loss, twin_gradient = with_gradient(upsample_cross_entropy_reference, logits, labels)
    true_loss, true_gradient = with_gradient(expected, logits.detach().double().requires_grad_(), labels)
    assert error(loss, true_loss) <= 2 * error(twin_loss, true_loss) + 1e-6
    assert error(gradient, true_gradient) <= 2 * error(twin_gradient, true_gradient) + 1e-6


def test_one_class_has_no_loss(kernels, device):
    loss, gradient = with_gradient(upsample_cross_entropy, *inputs(1, (9, 13), (50, 61), device))
    assert loss.abs().max() == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("size", [(7, 9), (2, 2)])
def test_gradcheck(kernels, device, size):
    logits, labels = inputs(4, (3, 4), size, device, torch.float64)
    assert torch.autograd.gradcheck(lambda x: upsample_cross_entropy(x, labels), (logits,))


def test_any_memory_layout(kernels, device):
    logits, labels = inputs(19, (6, 5), (30, 21), device)
    want = with_gradient(upsample_cross_entropy, logits, labels)
    wide = torch.zeros(3, 38, 12, 5, device=device)
    wide[:, ::2, 1::2] = logits.detach()
    for other in (logits.detach().to(memory_format=torch.channels_last), wide[:, ::2, 1::2]):
        got = with_gradient(upsample_cross_entropy, other.requires_grad_(), labels)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    swapped = labels.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(upsample_cross_entropy(logits, swapped), want[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_scores_show_in_their_image(implementation, device, value):
    logits, labels = inputs(5, (4, 4), (9, 9), device)
    labels[:] = 2
    with torch.no_grad():
        logits[1, 3, 2, 2] = value
    assert upsample_cross_entropy(logits, labels).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("device", [torch.device("cpu")])
@pytest.mark.parametrize("label", [5, -2])
def test_unknown_labels_are_refused_on_the_cpu(implementation, device, label):
    logits, labels = inputs(5, (4, 4), (9, 9), device)
    labels[1, 8, 3] = label
    with pytest.raises((ValueError, IndexError), match="labels|out of bounds"):
        upsample_cross_entropy(logits, labels)


@pytest.mark.cuda
def test_unknown_labels_make_the_loss_nan_on_a_gpu():
    logits, labels = inputs(5, (4, 4), (9, 9), torch.device("cuda"))
    labels[1, 8, 3] = 5
    assert upsample_cross_entropy(logits, labels).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_thread_count_does_not_matter(kernels, device):
    sample = inputs(70, (9, 7), (50, 41), device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = with_gradient(upsample_cross_entropy, *sample)
        torch.set_num_threads(5)
        assert all(map(torch.equal, with_gradient(upsample_cross_entropy, *sample), first))
    finally:
        torch.set_num_threads(before)


def test_operator_contract_and_compilation(kernels, device):
    logits, labels = inputs(5, (3, 4), (6, 7), device)
    torch.library.opcheck(torch.ops.reclip_d2.upsample_cross_entropy, (logits, labels))
    torch._dynamo.reset()
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = with_gradient(compiled, logits, labels)
    assert all(map(torch.equal, ours, with_gradient(upsample_cross_entropy, logits, labels)))


def test_empty_batch(implementation, device):
    labels = torch.zeros(0, 8, 8, dtype=torch.int64, device=device)
    assert upsample_cross_entropy(torch.zeros(0, 3, 4, 4, device=device), labels).shape == (0,)


GRID, LABELS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`logits` must have shape .B,C,h,w.", (GRID[0], LABELS)),
        (TypeError, "`logits` must be float64", (GRID.int(), LABELS)),
        (ValueError, "must have channels and a grid", (GRID[:, :0], LABELS)),
        (TypeError, "`labels` must be torch.int64", (GRID, LABELS.int())),
        (ValueError, "`labels` must be .B,H,W. with B = 2", (GRID, LABELS[:1])),
        (ValueError, "`labels` must be .B,H,W. with B = 2", (GRID, LABELS[:, :, :0])),
    ],
)
def test_wrong_arguments_give_one_clear_line(error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        upsample_cross_entropy(*arguments)
    assert "\n" not in str(caught.value)
