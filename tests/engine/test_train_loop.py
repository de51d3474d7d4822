"""The training loop: accumulated gradients against whole batches, mixed precision, several processes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reclip_d2.config import load_config
from reclip_d2.engine.train_loop import SeedIteration, TrainLoop, amp_dtype_of, split_batch
from reclip_d2.errors import ReclipError
from tests.helpers import make_rectified, random_image
from tests.processes import run_processes


class Regression(nn.Module):
    """Two losses, each a mean over the images of a batch; no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 7)
        self.out = nn.Linear(7, 1)
        self.seen: list[tuple[bool, torch.dtype, torch.dtype]] = []

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        x = torch.stack([record["x"] for record in batch])
        hidden = self.hidden(x)
        self.seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), hidden.dtype))
        error = (
            self.out(hidden.tanh())[:, 0].float() if hidden.dtype != torch.float64 else self.out(hidden.tanh())[:, 0]
        )
        target = torch.stack([record["y"] for record in batch])
        return {"loss_square": (error - target).square().mean(), "loss_size": 0.1 * error.abs().mean()}


def batches(count: int, size: int, dtype: torch.dtype = torch.float64) -> list[list[dict]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return [[{"x": draw(5), "y": draw(())} for _ in range(size)] for _ in range(count)]


def make_regression(dtype: torch.dtype = torch.float64) -> Regression:
    torch.manual_seed(0)
    return Regression().to(dtype)


def train(model: nn.Module, data: list, steps: int | None = None, **options: object) -> tuple[TrainLoop, EventStorage]:
    """Some iterations; the scalars of each are in the storage's histories."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    loop = TrainLoop(model, data, optimizer, **options)
    model.train()
    with EventStorage(0) as storage:
        for _ in range(steps or len(data)):
            loop.run_step()
            storage.step()
    return loop, storage


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- accumulation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5, 12])
def test_parts_of_a_batch_train_as_the_whole(parts):
    """12 images in 5 parts: of 2, 2, 3, 2 and 3."""
    data = batches(6, 12)
    whole, split = make_regression(), make_regression()
    _, expected = train(whole, data)
    _, found = train(split, data, accumulate_steps=parts)
    assert len(split.seen) == parts * len(whole.seen)
    for name, value in weights(whole).items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-12, atol=1e-14)
    for name in ("total_loss", "loss_square", "loss_size"):
        losses = [value for value, _ in expected.history(name).values()]
        assert [value for value, _ in found.history(name).values()] == pytest.approx(losses, rel=1e-12)
        assert len(losses) == 6


def test_batches_of_another_size_train_otherwise():
    """The comparison above can fail: without the shares of the parts, or with a step a part, weights differ."""
    data = batches(6, 12)
    whole, halves = make_regression(), make_regression()
    train(whole, data)
    train(halves, [half for batch in data for half in (batch[:6], batch[6:])])
    assert (whole.hidden.weight - halves.hidden.weight).abs().max() > 1e-3


def test_rectification_without_batch_norm_in_parts():
    """The coverage loss draws no noise; all images are of one size."""
    data = [[{"image": random_image(i), "hypothesis": torch.tensor([i % 3, 3])} for i in range(4)]]
    grads = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = make_rectified(decoder={"norm": ""}, loss_weights={"contrastive": 0.0, "coverage": 1.0})
        train(model, data, accumulate_steps=parts)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 5  # prompt vectors, projection and convolution
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("size", "parts", "lengths"),
    [(12, 1, [12]), (12, 3, [4, 4, 4]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 3, [1] * 3)],
)
def test_split(size, parts, lengths):
    pieces = split_batch(list(range(size)), parts)
    assert [len(piece) for piece in pieces] == lengths
    assert sum(pieces, []) == list(range(size))


def test_fewer_images_than_parts():
    with pytest.raises(ReclipError, match=r"SOLVER.ACCUMULATE_STEPS 4 exceeds the 3 images .*IMS_PER_BATCH"):
        split_batch([1, 2, 3], 4)


def test_no_parts_at_all():
    with pytest.raises(ReclipError, match="SOLVER.ACCUMULATE_STEPS is 0; it must be a whole number from 1"):
        load_config("", ["SOLVER.ACCUMULATE_STEPS", "0"])


# ---- loader -----------------------------------------------------------------------------------------------------


def test_a_loader_is_opened_with_the_first_iteration_and_can_be_replaced():
    opened = []

    class Loader:
        def __init__(self, name: str) -> None:
            self.name = name

        def __iter__(self):
            opened.append(self.name)
            torch.rand(7)  # as PyTorch's loader draws its workers' seed
            return iter(batches(4, 3))

    model = make_regression()
    loop = TrainLoop(model, Loader("first"), torch.optim.SGD(model.parameters(), lr=0.1))
    loop.reset_data_loader(lambda: Loader("second"))
    assert opened == []
    torch.manual_seed(3)
    with EventStorage(0):
        loop.run_step()
        loop.run_step()
    assert opened == ["second"]
    following = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(following, torch.rand(2))  # nothing was taken from the noise's generator


# ---- mixed precision --------------------------------------------------------------------------------------------


def test_bfloat16_runs_the_forward_pass_only():
    model, plain = make_regression(torch.float32), make_regression(torch.float32)
    data = batches(8, 12, torch.float32)
    loop, storage = train(model, data, amp_dtype=torch.bfloat16)
    train(plain, data)
    assert set(model.seen) == {(True, torch.bfloat16, torch.bfloat16)}
    assert {seen[0] for seen in plain.seen} == {False}
    assert not loop.grad_scaler.is_enabled()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    difference = (model.hidden.weight - plain.hidden.weight).abs().max()
    assert 0 < difference < 0.02  # eight steps of 0.1 in a format of eight bits


def test_scaled_gradients_give_the_unscaled_step():
    """float16's scaler on weights in float64: only the scale, a power of two, is in play."""
    model, plain = make_regression(), make_regression()
    data = batches(4, 6)
    loop, _ = train(model, data, amp_dtype=None)
    train(plain, data)
    scaled = make_regression()
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    loop = TrainLoop(scaled, data, optimizer, accumulate_steps=2)
    loop.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with EventStorage(0):
        for _ in data:
            loop.run_step()
    for name, value in weights(plain).items():
        torch.testing.assert_close(scaled.state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_a_step_whose_gradient_overflows_is_left_out():
    model = make_regression(torch.float32)
    data = batches(1, 4, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = TrainLoop(model, data, optimizer, amp_dtype=torch.float16)
    loop.amp_dtype = torch.bfloat16  # the scaler is what is tested; not every CPU has float16 arithmetic
    assert loop.grad_scaler.is_enabled()
    scale = loop.grad_scaler.get_scale()
    model.out.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(model)
    with EventStorage(0):
        loop.run_step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert loop.grad_scaler.get_scale() == scale / 2


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ((), None),
        (("SOLVER.AMP.ENABLED", "True"), torch.float16),
        (("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"), torch.bfloat16),
        (("SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu"), torch.bfloat16),
    ],
)
def test_keys(keys, dtype, caplog):
    with caplog.at_level(logging.INFO):
        assert amp_dtype_of(load_config("", list(keys))) == dtype
    assert ("bfloat16 instead of float16" in caplog.text) == ("cpu" in keys)


def test_an_unknown_precision():
    with pytest.raises(ReclipError, match="SOLVER.AMP.DTYPE is 'float8'; choose one of float16, bfloat16"):
        load_config("", ["SOLVER.AMP.DTYPE", "float8"])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rectification_under_autocast_on_a_gpu(dtype):
    model = make_rectified(loss_weights={"coverage": 1.0}).cuda()
    data = [[{"image": random_image(i), "hypothesis": torch.tensor([i % 3, 3])} for i in range(4)]] * 5
    before = weights(model)
    _, storage = train(model, data, amp_dtype=dtype, accumulate_steps=2)
    assert all(torch.isfinite(torch.tensor(value)) for value, _ in storage.history("total_loss").values())
    assert all(
        torch.isfinite(value).all() and value.dtype == before[name].dtype for name, value in weights(model).items()
    )
    assert not torch.equal(before["mask_decoder.conv.weight"], model.mask_decoder.conv.weight)


# ---- several processes ------------------------------------------------------------------------------------------


def train_a_share(rank, folder, parts):
    """Worker: every second image of each batch; counts how often the processes exchange gradients."""
    model = DistributedDataParallel(make_regression())
    calls = []

    def average(state, bucket):
        calls.append(1)
        gradients = bucket.buffer().div_(2)
        torch.distributed.all_reduce(gradients)
        done = torch.futures.Future()  # not all_reduce's own: a callback of Python's on it may outlive the interpreter
        done.set_result(gradients)
        return done

    model.register_comm_hook(None, average)
    train(model, [batch[rank::2] for batch in batches(3, 12)], accumulate_steps=int(parts))
    torch.save({"calls": len(calls), "weights": weights(model.module)}, folder / f"{rank}.pt")


def test_two_processes_train_as_one_and_exchange_gradients_once_an_iteration(tmp_path):
    run_processes(train_a_share, tmp_path, "3")
    alone = make_regression()
    train(alone, batches(3, 12))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["calls"] == 3  # one bucket, three iterations
        for name, value in weights(alone).items():
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-12, atol=1e-14)


# ---- the seed of an iteration ------------------------------------------------------------------------------------


def noise(seed: int, iteration: int) -> list[float]:
    hook = SeedIteration(seed)
    hook.trainer = SimpleNamespace(iter=iteration)
    hook.before_step()
    return torch.rand(3).tolist()


def test_noise_of_an_iteration_depends_on_seed_and_iteration_only():
    torch.manual_seed(99)
    first = noise(1, 5)
    torch.rand(17)
    assert noise(1, 5) == first
    assert noise(1, 6) != first
    assert noise(2, 5) != first
    assert noise(5, 1) != first


def test_processes_draw_different_noise(monkeypatch):
    first = noise(1, 5)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    assert noise(1, 5) != first
