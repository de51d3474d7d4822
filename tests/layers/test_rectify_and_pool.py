"""rectify_and_pool: kernels against the twin on the same noise, gradients, determinism, errors.

Shapes: B images, n patches, D embedding width, C classes, K hypothesis rows.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from reclip_d2.layers import gumbel_noise, masked_average_pool, nonfinite_images, rectify_and_pool, use_kernels

# (C, n, D, hypothesis classes): every value of each, and pairs that mix small, odd and large.
SWEEP = [
    (1, 1, 1, 0),
    (1, 441, 64, 1),
    (2, 63, 513, 1),
    (2, 1025, 512, 0),
    (19, 1025, 64, 13),
    (20, 441, 512, 13),
    (20, 1025, 513, 1),
    (27, 63, 1, 13),
    (59, 1, 512, 13),
    (59, 441, 64, 0),
    (150, 1025, 1, 94),
    (150, 441, 512, 13),
    (171, 63, 64, 94),
    (171, 1, 513, 1),
    (1000, 441, 513, 94),
    (1000, 63, 512, 1),
    # About what a CUDA block can keep in shared memory without and with asking: 380 and 504 classes in float32, half of
    # that in float64. The larger ones come later: they would ask for the smaller.
    (384, 33, 5, 13),
    (192, 33, 5, 13),
    (250, 31, 1, 1),
    (500, 31, 1, 94),
]


def tolerance(dtype, width):
    """Allowed rounding error of a result, relative to its norm.

    Sums are float32 at least. A sum of ``width`` products of random numbers, one after the other, errs by about
    sqrt(width) / 2 units in the last place of its result; kernel and twin sum in different orders. The 16 units are
    for the exponentials and logarithms. What is stored in half precision is rounded once more: see the twin's error.
    """
    if dtype == torch.float64:
        return 1e-10
    return torch.finfo(torch.float32).eps * (16 + math.sqrt(width)) + {torch.float32: 0.0}.get(dtype, 1e-4)


def run(sample, hard, tau=0.7, bias=True):
    """Outputs and gradients of one call, for a loss that weights all outputs at random."""
    logits, features = (t.detach().requires_grad_() for t in (sample.logits, sample.features))
    bias = sample.bias.detach().requires_grad_() if bias else None
    pooled, area = rectify_and_pool(logits, bias, features, sample.class_ids, sample.offsets, tau, hard, sample.seed)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled)
    area_weights = torch.randn(area.shape, generator=generator, dtype=torch.float64).to(area)
    inputs = [t for t in (logits, bias, features) if t is not None]
    gradients = torch.autograd.grad((pooled * weights).sum() + (area * area_weights).sum(), inputs)
    return (pooled.detach(), area.detach(), *gradients)


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check_against_the_twin(sample, hard):
    """A kernel may err by rounding, and where the problem is ill-conditioned a few times what the twin errs.

    Both are held against the twin in float64.
    """
    actual = run(sample, hard)
    with use_kernels(False):
        twin = run(sample, hard)
        tensors = [t.double() for t in sample[:3]]
        exact = run(type(sample)(*tensors, *sample[3:]), hard)
    for got, alike, want in zip(actual, twin, exact, strict=True):
        assert got.dtype == alike.dtype and got.shape == alike.shape
        allowed = 3 * relative_error(alike, want) + tolerance(got.dtype, sample.features.shape[2])
        assert relative_error(got, want) <= allowed


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "patches", "width", "rows"), SWEEP)
def test_kernels_equal_the_twin(make_sample, kernels, classes, patches, width, rows, dtype, hard):
    check_against_the_twin(make_sample(classes, patches, width, rows, dtype), hard)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("classes", "patches", "width", "rows"), SWEEP[1::3])
def test_low_precision_equals_the_twin(make_sample, kernels, classes, patches, width, rows, dtype, hard):
    check_against_the_twin(make_sample(classes, patches, width, rows, dtype), hard)


def test_outputs_of_low_precision_inputs_are_float32(make_sample, implementation):
    pooled, area, grad_logits, grad_bias, grad_features = run(make_sample(5, 9, 4, 2, torch.bfloat16), True)
    assert pooled.dtype == area.dtype == grad_bias.dtype == torch.float32
    assert grad_logits.dtype == grad_features.dtype == torch.bfloat16


@pytest.mark.parametrize("hard", [True, False])
def test_against_loops_over_the_equations(make_sample, implementation, device, hard):
    sample = make_sample(5, 7, 3, 2, torch.float64, images=2)
    pooled, area = rectify_and_pool(*sample[:5], 0.5, hard, sample.seed)
    noise = gumbel_noise(sample.logits.shape, sample.seed, dtype=torch.float64).tolist()
    logits, bias, features = sample.logits.tolist(), sample.bias.tolist(), sample.features.tolist()
    bounds = sample.offsets.tolist()
    for image in range(2):
        for row in range(bounds[image], bounds[image + 1]):
            k, total, sums = int(sample.class_ids[row]), 0.0, [0.0] * 3
            for i in range(7):
                scores = [(logits[image][i][c] - bias[i][c]) / 0.5 + noise[image][i][c] for c in range(5)]
                weights = [math.exp(score) for score in scores]
                mask = float(scores[k] == max(scores)) if hard else weights[k] / sum(weights)
                total += mask
                sums = [s + mask * z for s, z in zip(sums, features[image][i], strict=True)]
            expected = [s / total if total else 0.0 for s in sums]
            assert area[row].item() == pytest.approx(total, rel=1e-12)
            assert pooled[row].tolist() == pytest.approx(expected, rel=1e-12)


def test_without_bias_equals_a_zero_bias(make_sample, implementation):
    sample = make_sample(20, 63, 16, 3)
    zero = sample._replace(bias=torch.zeros_like(sample.bias))
    without = run(sample, True, bias=False)
    with_zero = run(zero, True)
    for got, want in zip(without, (*with_zero[:3], with_zero[4]), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck_of_soft_masks(make_sample, implementation):
    sample = make_sample(5, 6, 4, 3, torch.float64, images=2)
    inputs = [t.detach().clone().requires_grad_() for t in sample[:3]]

    def function(logits, bias, features):
        return rectify_and_pool(logits, bias, features, sample.class_ids, sample.offsets, 0.8, False, sample.seed)

    assert torch.autograd.gradcheck(function, inputs)


def test_only_the_gradients_asked_for_are_made(make_sample, kernels):
    sample = make_sample(20, 63, 16, 3)
    whole = run(sample, True)[2:]
    for chosen in range(3):
        inputs = [t.detach() for t in sample[:3]]
        inputs[chosen].requires_grad_()
        pooled, area = rectify_and_pool(*inputs, sample.class_ids, sample.offsets, 0.7, True, sample.seed)
        generator = torch.Generator().manual_seed(5)
        weights = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled)
        area_weights = torch.randn(area.shape, generator=generator, dtype=torch.float64).to(area)
        ((pooled * weights).sum() + (area * area_weights).sum()).backward()
        assert torch.equal(inputs[chosen].grad, whole[chosen])
        assert all(t.grad is None for i, t in enumerate(inputs) if i != chosen)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("classes", [20, 21])
def test_backward_pass_without_the_saved_normalizer(make_sample, kernels, classes, hard):
    """What the forward pass saves for the gradient changes no bit of it."""
    sample = make_sample(classes, 63, 16, 5)
    ops = torch.ops.reclip_d2
    pooled, area, normalizer = ops.rectify_and_pool_forward(*sample, 0.5, hard)
    for got, want in zip(ops.rectify_and_pool(*sample, 0.5, hard), (pooled, area), strict=True):
        assert torch.equal(got, want)
    gradients = [torch.randn_like(pooled), torch.randn_like(area)]
    results = [
        ops.rectify_and_pool_backward(*gradients, *sample, pooled, area, 0.5, hard, True, True, True, given)
        for given in (None, normalizer)
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("hard", [True, False])
def test_memory_layout_does_not_matter(make_sample, implementation, hard):
    sample = make_sample(27, 63, 20, 5)
    wide = torch.randn(3, 63, 41, device=sample.features.device)
    wide[..., 1::2] = sample.features
    other = sample._replace(logits=sample.logits.contiguous(), bias=sample.bias.contiguous(), features=wide[..., 1::2])
    for got, want in zip(run(other, hard), run(sample, hard), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_expanded_logits_are_read_in_place(make_sample, implementation):
    sample = make_sample(19, 63, 8, 4)
    expanded = sample._replace(logits=sample.logits[:1].expand(3, -1, -1))
    copied = sample._replace(logits=expanded.logits.clone())
    for got, want in zip(run(expanded, True)[:2], run(copied, True)[:2], strict=True):
        assert torch.equal(got, want)


def test_gradient_of_logits_keeps_their_layout(make_sample, kernels):
    sample = make_sample(19, 63, 8, 4)
    assert run(sample, True)[2].stride() == sample.logits.stride()


def test_operator_contract(make_sample, kernels):
    sample = make_sample(7, 9, 5, 3)
    logits, bias, features = (t.detach().clone().requires_grad_() for t in sample[:3])
    arguments = (features, sample.class_ids, sample.offsets, sample.seed, 0.5)
    operator = torch.ops.reclip_d2.rectify_and_pool
    torch.library.opcheck(operator, (logits, bias, *arguments, True))
    torch.library.opcheck(operator, (logits, None, *arguments, False))


@pytest.mark.parametrize("hard", [True, False])
def test_repeated_runs_are_identical(make_sample, kernels, hard):
    sample = make_sample(150, 441, 64, 13)
    first = run(sample, hard)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(sample, hard), first, strict=True))


@pytest.mark.parametrize("device", [torch.device("cpu")])
@pytest.mark.parametrize("hard", [True, False])
def test_thread_count_does_not_matter(make_sample, kernels, device, hard):
    sample = make_sample(150, 441, 513, 13)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(sample, hard))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_agree_with_the_twin(capability):
    program = (
        "import torch\n"
        "from reclip_d2.layers import draw_seed, rectify_and_pool, rectify_and_pool_reference, upsample_argmax\n"
        "from reclip_d2.layers import upsample_argmax_reference\n"
        "torch.manual_seed(0)\n"
        "logits, bias, z = torch.randn(2, 19, 441).transpose(1, 2), torch.randn(441, 19), torch.randn(2, 441, 65)\n"
        "ids, offsets = torch.tensor([3, 1, 18]), torch.tensor([0, 2, 3])\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    for hard in (True, False):\n"
        "        results = []\n"
        "        seed = torch.tensor([1, 2])\n"
        "        for function in (rectify_and_pool, rectify_and_pool_reference):\n"
        "            x = logits.to(dtype).requires_grad_()\n"
        "            pooled, area = function(x, bias, z.to(dtype), ids, offsets, 0.5, hard, seed)\n"
        "            results.append((pooled, area, *torch.autograd.grad(pooled.sum() + area.sum(), x)))\n"
        "        for a, b in zip(*results):\n"
        "            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype != torch.float32 else 1e-4, atol=1e-5)\n"
        "grid = torch.randn(1, 19, 9, 7)\n"
        "assert torch.equal(upsample_argmax(grid, (50, 41)), upsample_argmax_reference(grid, (50, 41)))\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_manual_seed_governs_the_noise(make_sample, implementation):
    sample = make_sample(20, 63, 8, 4)
    torch.manual_seed(11)
    first = rectify_and_pool(*sample[:5], 1.0)
    second = rectify_and_pool(*sample[:5], 1.0)
    torch.manual_seed(11)
    again = rectify_and_pool(*sample[:5], 1.0)
    assert torch.equal(first[1], again[1]) and torch.equal(first[0], again[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hard", [True, False])
def test_nonfinite_logits_are_reported_and_do_not_spread(make_sample, implementation, value, hard):
    sample = make_sample(19, 63, 8, 4)
    sample.logits[1, 5, 2] = value
    pooled, area, grad_logits, grad_bias, grad_features = run(sample, hard)
    start, stop = sample.offsets[1], sample.offsets[2]
    assert nonfinite_images(area, sample.offsets) == [1]
    assert area[start:stop].isnan().all() and pooled[start:stop].isnan().all()
    others = torch.ones(area.shape[0], dtype=torch.bool)
    others[start:stop] = False
    assert pooled[others].isfinite().all() and area[others].isfinite().all()
    assert (grad_logits[1, 5] == 0).all()
    assert all(gradient.isfinite().all() for gradient in (grad_logits, grad_bias, grad_features))


def test_overflow_of_the_scaled_logits_is_reported(make_sample, implementation):
    sample = make_sample(5, 9, 4, 2)
    sample.logits[0, 3, 1] = 1e38
    area = rectify_and_pool(*sample[:5], 1e-3, True, sample.seed)[1]
    assert nonfinite_images(area, sample.offsets) == [0]


def test_nonfinite_bias_is_reported_for_all_images(make_sample, implementation):
    sample = make_sample(5, 9, 4, 3)
    sample.bias[2, 2] = math.nan
    area = rectify_and_pool(*sample[:5], 1.0, True, sample.seed)[1]
    assert nonfinite_images(area, sample.offsets) == [0, 1, 2]


def test_class_that_wins_no_patch_gives_zero_and_no_gradient(make_sample, implementation):
    sample = make_sample(5, 9, 4, 1)
    k = int(sample.class_ids[0])
    sample.logits[0, :, k] = -1e4
    logits = sample.logits.detach().requires_grad_()
    pooled, area = rectify_and_pool(
        logits, None, sample.features, sample.class_ids, sample.offsets, 1.0, True, sample.seed
    )
    assert area[0] == 0 and (pooled[0] == 0).all()
    pooled[0].sum().backward()
    assert (logits.grad == 0).all()


def test_soft_mask_too_small_for_float32(implementation, device):
    """Two patches, two classes, of which the hypothesis names the one with probability exp(-90).

    With s_i the scores' differences, q = softmax over the patches of -log(1 + exp(s_i)): the pooled feature is
    q_1 + 2 q_2, its gradient q; that of the log-probabilities is q_1 q_2 (-1, 1), divided by tau for the logits.
    """
    seed, tau = torch.tensor([1, 2]), 0.01
    noise = gumbel_noise((1, 2, 2), seed, dtype=torch.float64)[0]
    logs = [-math.log1p(math.exp(90 + float(noise[i, 0] - noise[i, 1]))) for i in range(2)]
    q2 = 1 / (1 + math.exp(logs[0] - logs[1]))
    logits = torch.tensor([[[0.0, -0.9], [0.0, -0.9]]], device=device, requires_grad=True)
    features = torch.tensor([[[1.0], [2.0]]], device=device, requires_grad=True)
    pooled, area = rectify_and_pool(
        logits, None, features, torch.tensor([1]), torch.tensor([0, 1]), tau, hard=False, seed=seed
    )
    pooled.sum().backward()
    assert 0 < area.item() < 1e-37
    assert pooled.item() == pytest.approx(1 + q2, rel=1e-5) == pytest.approx(1.7172, abs=1e-4)
    assert features.grad.flatten().tolist() == pytest.approx([1 - q2, q2], rel=1e-5)
    slope = q2 * (1 - q2) / tau
    assert slope == pytest.approx(20.283, abs=1e-3)
    assert logits.grad.flatten().tolist() == pytest.approx([slope, -slope, -slope, slope], rel=1e-5)


@pytest.mark.parametrize("classes", [7, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_masks_of_any_size_against_the_formula(make_sample, implementation, classes, dtype):
    """Rows with areas from 1 to exp(-500) in one image, against the gradient written out with logarithms in float64."""
    sample, tau = make_sample(classes, 35, 9, 4, dtype, images=2), 0.02
    logits, bias, features = sample.logits.clone(), sample.bias * 0.05, sample.features
    for row, lift in enumerate((4.0, 2.0, 1.0, -4.0)):
        logits[0, :, sample.class_ids[row]] = lift + 0.05 * logits[0, :, sample.class_ids[row]]
    actual = run(sample._replace(logits=logits, bias=bias), hard=False, tau=tau)

    noise = gumbel_noise(logits.shape, sample.seed, dtype=torch.float64)
    scores = (logits.cpu().double() - bias.cpu().double()) / tau + noise
    log_masks, z = torch.log_softmax(scores, dim=-1), features.cpu().double()
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(actual[0].shape, generator=generator, dtype=torch.float64)
    area_weights = torch.randn(actual[1].shape, generator=generator, dtype=torch.float64)
    pooled, area = torch.empty_like(weights), torch.empty_like(area_weights)
    of_logs, of_features = torch.zeros_like(log_masks), torch.zeros_like(z)
    for image in range(2):
        for row in range(int(sample.offsets[image]), int(sample.offsets[image + 1])):
            k = int(sample.class_ids[row])
            share = log_masks[image, :, k].softmax(0)
            area[row] = log_masks[image, :, k].exp().sum()
            pooled[row] = share @ z[image]
            of_logs[image, :, k] = share * ((z[image] - pooled[row]) @ weights[row] + area[row] * area_weights[row])
            of_features[image] += share[:, None] * weights[row]
    of_logits = (of_logs - log_masks.exp() * of_logs.sum(-1, keepdim=True)) / tau
    assert area[:4].min() < 1e-80 and area.max() > 1
    tiny = sample.class_ids[:4][area[:4] < 1e-40]
    assert of_logits[0][:, tiny].norm() > 1  # what float32 cannot hold as a mask has a gradient all the same
    expected = (pooled, area, of_logits, -of_logits.sum(0), of_features)
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got.cpu(), want) < (1e-10 if dtype == torch.float64 else 1e-4)


def test_equals_the_composition_of_its_parts(make_sample, implementation, device):
    from reclip_d2.layers import gumbel_softmax

    sample = make_sample(20, 63, 16, 5)
    masks = gumbel_softmax(sample.logits - sample.bias, 0.7, True, sample.seed)
    parts = masked_average_pool(sample.features, masks, sample.class_ids, sample.offsets)
    whole = rectify_and_pool(*sample[:5], 0.7, True, sample.seed)
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)


def test_mixed_precision_inputs_and_autocast(make_sample, implementation, device):
    sample = make_sample(20, 63, 16, 5)
    logits = sample.logits.bfloat16()
    expected = rectify_and_pool(logits.float(), *sample[1:5], 0.7, True, sample.seed)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        pooled, area = rectify_and_pool(logits, *sample[1:5], 0.7, True, sample.seed)
    assert pooled.dtype == area.dtype == torch.float32
    assert torch.equal(area, expected[1])
    torch.testing.assert_close(pooled, expected[0], rtol=1e-5, atol=1e-6)


def compiled_step(logits, bias, features, class_ids, offsets, seed):
    pooled, area = rectify_and_pool(logits, bias * 2, features, class_ids, offsets, 0.5, True, seed)
    return (pooled * pooled).sum() + area.sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(make_sample, kernels, backend):
    sample = make_sample(7, 9, 5, 3)
    torch._dynamo.reset()
    results = []
    for step in (compiled_step, torch.compile(compiled_step, fullgraph=True, backend=backend)):
        logits, bias = (t.detach().clone().requires_grad_() for t in sample[:2])
        loss = step(logits, bias, *sample[2:])
        loss.backward()
        results.append((loss.detach(), logits.grad, bias.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_with_a_seed_drawn_inside(make_sample, kernels, backend):
    sample = make_sample(7, 63, 5, 3)
    torch._dynamo.reset()
    step = torch.compile(lambda *tensors: rectify_and_pool(*tensors, 2.0), fullgraph=True, backend=backend)
    areas = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        areas.append(step(*sample[:5])[1])
    assert torch.equal(areas[0], areas[2]) and not torch.equal(areas[0], areas[1])


BAD_CALLS = {
    "logits.*differ in": lambda s: {"features": s.features[:, 1:]},
    "`logits` must have shape": lambda s: {"logits": s.logits[0]},
    "`bias` .* must be .n,C.": lambda s: {"bias": s.bias[1:]},
    "`offsets` must have B.1 = 4": lambda s: {"offsets": s.offsets[1:]},
    "`offsets` must rise": lambda s: {"offsets": s.offsets.flip(0)},
    "holds 5 for image 0; there are 5 classes": lambda s: {"class_ids": s.class_ids.clone().fill_(5)},
    "more than once for image 0": lambda s: {"class_ids": s.class_ids.clone().fill_(1)},
    "`tau` must be positive": lambda s: {"tau": 0.0},
    "`seed` must be an int64 tensor of shape": lambda s: {"seed": torch.zeros(3, dtype=torch.int64)},
    "`features` is on meta": lambda s: {"features": s.features.to("meta")},
}
BAD_TYPES = {
    "`logits` must be float64": lambda s: {"logits": s.logits.int()},
    "float64 does not mix": lambda s: {"features": s.features.double()},
    "`class_ids` must be a one-dimensional int64": lambda s: {"class_ids": s.class_ids.int()},
    "`features` must be a tensor": lambda s: {"features": [1.0]},
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [(ValueError, *item) for item in BAD_CALLS.items()] + [(TypeError, *item) for item in BAD_TYPES.items()],
)
def test_wrong_arguments_give_one_clear_line(make_sample, implementation, error, message, change):
    sample = make_sample(5, 9, 4, 2)
    arguments = {**sample._asdict(), "tau": 1.0, **change(sample)}
    with pytest.raises(error, match=message) as caught:
        rectify_and_pool(**arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("rectify_and_pool: ")


def test_empty_batch_and_no_rows(make_sample, implementation):
    sample = make_sample(5, 9, 4, 0)
    pooled, area, *gradients = run(sample, True)
    assert pooled.shape == (0, 4) and area.shape == (0,)
    assert all((gradient == 0).all() for gradient in gradients)
    empty = rectify_and_pool(
        sample.logits[:0], sample.bias, sample.features[:0], sample.class_ids, torch.tensor([0]), 1.0
    )
    assert empty[0].shape == (0, 4)
