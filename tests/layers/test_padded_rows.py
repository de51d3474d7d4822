"""Hypothesis rows of padding: exactly neutral, wherever the rows are."""

import pytest
import torch

from reclip_d2.layers import NoiseCounter, draw_seed, gumbel_softmax, masked_average_pool, rectify_and_pool


def padded(sample, rows: int):
    """The sample with further rows, of classes that other rows may have."""
    return sample._replace(class_ids=torch.cat([sample.class_ids, torch.arange(rows) % sample.logits.shape[2]]))


def run(sample, hard: bool, weights) -> list[torch.Tensor]:
    """Results of the rows, and gradients of logits, bias and features."""
    inputs = [t.detach().clone().requires_grad_() for t in sample[:3]]
    pooled, area = rectify_and_pool(*inputs, *sample[3:5], 0.5, hard, sample.seed)
    rows = len(weights)
    loss = (pooled[:rows] * weights).sum() + area[:rows].sum() + 3 * pooled[rows:].sum() + area[rows:].sum()
    loss.backward()
    assert (pooled[rows:] == 0).all() and (area[rows:] == 0).all()
    return [pooled[:rows].detach(), area[:rows].detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (40, torch.float32), (3, torch.float64)])
def test_padding_changes_no_bit(make_sample, implementation, hard, rows, dtype):
    sample = make_sample(20, 63, 16, 5, dtype)
    weights = torch.randn(len(sample.class_ids), 16, dtype=dtype, device=sample.logits.device)
    expected = run(sample, hard, weights)
    for got, want in zip(run(padded(sample, rows), hard, weights), expected, strict=True):
        assert torch.equal(got, want)


def test_padding_of_masks(make_sample, implementation):
    sample = make_sample(20, 63, 16, 5)
    masks = gumbel_softmax(sample.logits, 0.5, False, sample.seed)
    results = []
    for given in (sample, padded(sample, 7)):
        features, own = sample.features.clone().requires_grad_(), masks.clone().requires_grad_()
        pooled, area = masked_average_pool(features, own, given.class_ids, given.offsets)
        (pooled.square().sum() + area.square().sum()).backward()
        results.append(
            (pooled[: len(sample.class_ids)].detach(), area[: len(sample.class_ids)], features.grad, own.grad)
        )
        assert (pooled[len(sample.class_ids) :] == 0).all() and (area[len(sample.class_ids) :] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("hard", [True, False])
def test_a_batch_of_padding_alone(make_sample, implementation, hard):
    sample = make_sample(5, 9, 4, 0)
    given = padded(sample, 4)
    results = run(given, hard, torch.zeros(0, 4, device=sample.logits.device))
    assert all((gradient == 0).all() for gradient in results[2:])


@pytest.mark.parametrize("hard", [True, False])
def test_more_rows_than_a_launch_can_carry(make_sample, implementation, hard):
    """Batches of one image each are the same as all images in one."""
    sample, images = make_sample(3, 2, 4, 0, images=520), 520
    ids, offsets = torch.tensor([2, 0]).repeat(images), torch.arange(images + 1) * 2
    device = sample.logits.device
    pooled, area = rectify_and_pool(*sample[:3], ids, offsets, 0.5, hard, sample.seed)
    masks = gumbel_softmax(sample.logits - sample.bias, 0.5, hard, sample.seed)
    expected = masked_average_pool(sample.features, masks, ids.to(device), offsets.to(device))
    torch.testing.assert_close((pooled, area), expected, rtol=1e-5, atol=1e-6)


def test_more_rows_in_the_offsets_than_there_are(make_sample, implementation):
    sample = make_sample(5, 9, 4, 2)
    with pytest.raises(ValueError, match="`offsets` must rise from 0 to at most K = 2"):
        rectify_and_pool(*sample[:3], sample.class_ids[:2], sample.offsets, 1.0)


@pytest.mark.parametrize("hard", [True, False])
def test_rows_and_seed_on_the_device(make_sample, implementation, hard):
    """On a GPU the kernels read them there; the results are those of rows that the host has read."""
    sample = make_sample(20, 63, 16, 5)
    device, weights = sample.logits.device, torch.ones(len(sample.class_ids), 16, device=sample.logits.device)
    there = sample._replace(**{name: getattr(sample, name).to(device) for name in ("class_ids", "offsets", "seed")})
    for got, want in zip(run(padded(there, 3) if device.type == "cpu" else there, hard, weights),
                         run(sample, hard, weights), strict=True):  # fmt: skip
        assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("hard", [True, False])
def test_invalid_rows_on_a_gpu_are_not_a_number(make_sample, kernels, device, hard):
    if device.type != "cuda":
        pytest.skip("on the CPU invalid rows raise")
    sample = make_sample(5, 9, 4, 2)
    class_ids, offsets, seed = (t.to(device) for t in sample[3:])
    twice = class_ids.clone()
    twice[1] = twice[0]
    area = rectify_and_pool(*sample[:3], twice, offsets, 1.0, hard, seed)[1]
    assert area[:2].isnan().all() and not area[2:].isnan().any()
    area = rectify_and_pool(*sample[:3], class_ids, offsets.flip(0), 1.0, hard, seed)[1]
    assert area.isnan().all()


# ---- the counter ------------------------------------------------------------------------------------------------


def test_a_counter_gives_new_noise_each_time(make_sample, implementation, device):
    sample, first = make_sample(20, 63, 8, 4), draw_seed()
    counter = NoiseCounter(first, device)
    masks = [gumbel_softmax(sample.logits, 1.0, True, counter) for _ in range(2)]
    masks.append(rectify_and_pool(*sample[:5], 1.0, True, counter)[1])
    for number, got in enumerate(masks):  # the seed stays, the offset counts
        seed = torch.stack([first[0], first[1] + number])
        want = gumbel_softmax(sample.logits, 1.0, True, seed) if number < 2 else (
            rectify_and_pool(*sample[:5], 1.0, True, seed)[1])  # fmt: skip
        assert torch.equal(got, want)
    assert not torch.equal(masks[0], masks[1])
    counter.set(first)
    assert torch.equal(gumbel_softmax(sample.logits, 1.0, True, counter), masks[0])


def test_the_backward_pass_uses_the_noise_of_its_forward_pass(make_sample, implementation, device):
    sample, first = make_sample(20, 63, 8, 4), draw_seed()
    counter, results = NoiseCounter(first, device), []
    for seed in (counter, first):
        logits = sample.logits.detach().clone().requires_grad_()
        pooled, _ = rectify_and_pool(logits, *sample[1:5], 1.0, True, seed)
        counter.next()  # advances between forward and backward pass
        pooled.square().sum().backward()
        results.append(logits.grad)
    assert torch.equal(*results)


@pytest.mark.cuda
def test_a_graph_draws_new_noise_in_each_replay(make_sample, kernels, device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    sample, first = make_sample(20, 63, 8, 4), draw_seed()
    rows = tuple(t.to(device) for t in sample[3:5])
    counter = NoiseCounter(first, device)
    logits = sample.logits.detach().clone().requires_grad_()

    def step():
        pooled, area = rectify_and_pool(logits, sample.bias, sample.features, *rows, 1.0, True, counter)
        return area, torch.autograd.grad(pooled.square().sum(), logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    counter.set(first)
    for number in range(3):
        graph.replay()
        seed = torch.stack([first[0], first[1] + number])
        other = sample.logits.detach().clone().requires_grad_()
        pooled, area = rectify_and_pool(other, *sample[1:5], 1.0, True, seed)
        assert torch.equal(outputs[0], area)
        assert torch.equal(outputs[1], torch.autograd.grad(pooled.square().sum(), other)[0])


@pytest.mark.cuda
def test_a_graph_with_rows_on_the_host_is_refused(make_sample, kernels, device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    sample = make_sample(20, 63, 8, 4)
    with (
        pytest.raises(RuntimeError, match="in a CUDA graph `.*` must be on the GPU"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        rectify_and_pool(*sample[:5], 1.0, True, sample.seed)
