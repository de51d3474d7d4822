"""gumbel_softmax: kernels against the twin, the distribution of the samples, gradients, errors."""

import math

import pytest
import torch
from scipy import stats

from reclip_d2.layers import gumbel_noise, gumbel_softmax, use_kernels

# About what a CUDA block can keep in shared memory without and with asking; see test_rectify_and_pool.
KEPT = [(384, 33), (192, 33), (250, 31), (500, 31)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run(logits, hard, tau, seed):
    logits = logits.detach().requires_grad_()
    masks = gumbel_softmax(logits, tau, hard, seed)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(masks.shape, generator=generator, dtype=torch.float64).to(masks)
    return masks.detach(), *torch.autograd.grad((masks * weights).sum(), logits)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("classes", "patches"), [(1, 1), (2, 1025), (19, 63), (20, 441), (150, 63), (1000, 65), *KEPT])
def test_kernels_equal_the_twin(make_sample, kernels, classes, patches, dtype, hard):
    sample = make_sample(classes, patches, 1, 0, dtype)
    actual = run(sample.logits, hard, 0.5, sample.seed)
    with use_kernels(False):
        expected = run(sample.logits, hard, 0.5, sample.seed)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype == dtype
        error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert error < TOLERANCE[dtype]


def test_soft_masks_are_the_softmax_of_scaled_logits_plus_noise(implementation, device):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, device=device)
    seed = torch.tensor([4, 2])
    noise = gumbel_noise(logits.shape, seed, device, torch.float64)
    weights = torch.exp(logits / 0.25 + noise)
    torch.testing.assert_close(gumbel_softmax(logits, 0.25, False, seed), weights / weights.sum(-1, keepdim=True))


def test_hard_masks_are_one_hot_at_the_largest_score(implementation, device):
    logits = torch.randn(2, 50, 7, device=device)
    seed = torch.tensor([1, 2])
    masks = gumbel_softmax(logits, 0.5, True, seed)
    winner = (logits.double() / 0.5 + gumbel_noise(logits.shape, seed, device, torch.float64)).argmax(-1)
    assert torch.equal(masks, torch.nn.functional.one_hot(winner, 7).to(masks))


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_classes_are_sampled_from_the_softmax(implementation, device, tau):
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0], device=device)
    counts = gumbel_softmax(logits.expand(4, 5000, 5), tau, True, torch.tensor([9, 9])).sum((0, 1)).cpu()
    expected = torch.softmax(logits.double().cpu() / tau, 0) * 20_000
    assert stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue > 0.001


def test_gradcheck_of_soft_masks(implementation, device):
    logits = torch.randn(2, 3, 5, dtype=torch.float64, device=device).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax(x, 0.6, False, torch.tensor([1, 2])), logits)


@pytest.mark.cuda
def test_a_cuda_graph_is_refused():
    logits, seed = torch.randn(1, 4, 3, device="cuda"), torch.tensor([1, 2])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="in a CUDA graph `seed` must be on the GPU"), torch.cuda.graph(graph):
        gumbel_softmax(logits, 0.5, True, seed)


def test_hard_gradient_is_the_soft_one(implementation, device):
    logits, seed = torch.randn(2, 30, 6, device=device), torch.tensor([1, 2])
    torch.testing.assert_close(run(logits, True, 0.5, seed)[1], run(logits, False, 0.5, seed)[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hard", [True, False])
def test_nonfinite_patches_become_nan_and_pass_no_gradient(implementation, device, value, hard):
    logits = torch.randn(2, 5, 4, device=device)
    logits[1, 3, 2] = value
    masks, gradient = run(logits, hard, 1.0, torch.tensor([1, 2]))
    bad = torch.zeros(2, 5, dtype=torch.bool, device=device)
    bad[1, 3] = True
    assert masks[bad].isnan().all() and masks[~bad].isfinite().all()
    assert (gradient[bad] == 0).all() and gradient.isfinite().all()


def test_operator_contract(kernels, device):
    logits = torch.randn(2, 4, 3, device=device).transpose(1, 2).requires_grad_()
    for hard in (True, False):
        torch.library.opcheck(torch.ops.reclip_d2.gumbel_softmax, (logits, torch.tensor([1, 2]), 0.5, hard))


def test_empty_input(implementation, device):
    assert gumbel_softmax(torch.zeros(0, 4, 3, device=device), 1.0).shape == (0, 4, 3)
    assert gumbel_softmax(torch.zeros(2, 0, 3, device=device), 1.0, False).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`logits` must have shape", (torch.zeros(3, 4), 1.0)),
        (TypeError, "`logits` must be float64", (torch.zeros(2, 3, 4, dtype=torch.int64), 1.0)),
        (ValueError, "`tau` must be positive", (torch.zeros(2, 3, 4), -1.0)),
        (ValueError, "`tau` must be positive", (torch.zeros(2, 3, 4), math.nan)),
        (ValueError, "`seed` must be an int64", (torch.zeros(2, 3, 4), 1.0, True, torch.zeros(2))),
    ],
)
def test_wrong_arguments_give_one_clear_line(error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        gumbel_softmax(*arguments)
    assert "\n" not in str(caught.value)
