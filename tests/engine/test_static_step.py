"""The step from fixed buffers against the plain training loop; the graph itself needs a GPU."""

import copy
import logging

import pytest
import torch
from detectron2.utils.events import EventStorage

from reclip_d2.config import load_config
from reclip_d2.engine.solver import build_optimizer
from reclip_d2.engine.static_step import MOST_GRAPHS, StaticStep, build_static_step, why_not_static
from reclip_d2.engine.train_loop import SeedIteration, TrainLoop
from reclip_d2.errors import ReclipError
from reclip_d2.layers import kernels_available
from tests.helpers import make_distillation, make_rectified, random_image

MODELS = {"rectified": make_rectified, "distillation": make_distillation}


def batches(count: int, size: tuple[int, int] = (32, 40)) -> list[list[dict]]:
    """Batches of two images, with one to four classes together."""
    return [
        [
            {"image": random_image(2 * i, *size), "hypothesis": torch.arange(i % 3)},
            {"image": random_image(2 * i + 1, *size), "hypothesis": torch.tensor([3])},
        ]
        for i in range(count)
    ]


def train(model, data, device="cpu", optimizer="SGD", static=True, decay=True, **options):
    """Train with gradient clipping, and a learning rate that changes (``decay``); returns the weights."""
    keys = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.BASE_LR", "0.02"]
    model = model.to(device).train()
    optimizer = build_optimizer(load_config("", keys), model)
    step = StaticStep(model, optimizer) if static else None
    loop = TrainLoop(model, data, optimizer, static_step=step, max_iter=len(data), **options)
    hook = SeedIteration(7)
    hook.trainer = loop
    with EventStorage(0) as storage:
        for loop.iter in range(len(data)):
            hook.before_step()
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + loop.iter * decay)
                if "eps" in group:  # AdamW would turn the rounding of gradients that are zero into full steps
                    group["eps"] = 1e-3
            loop.run_step()
            storage.step()
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}, storage


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_from_buffers_are_those_of_the_loop(name, optimizer):
    model, data = MODELS[name](), batches(4)
    expected, _ = train(copy.deepcopy(model), data, optimizer=optimizer, static=False)
    first, _ = train(copy.deepcopy(model), data, optimizer=optimizer)
    second, _ = train(copy.deepcopy(model), data, optimizer=optimizer)
    for key, want in expected.items():
        assert torch.equal(first[key], second[key]), key
        assert torch.equal(first[key], want), key


def test_batches_of_other_sizes_have_other_buffers(caplog):
    model = make_rectified().train()
    step = StaticStep(model, torch.optim.SGD(model.parameters(), lr=0.01))
    sizes = [(32, 8 * k) for k in range(2, 4 + MOST_GRAPHS)]
    for size in [*sizes, sizes[0]]:
        losses = step.run(batches(2, size)[1])
        assert torch.isfinite(losses["loss_contrastive"])
    assert len(step._graphs) == MOST_GRAPHS
    assert caplog.text.count("more than 8 combinations of sizes") == 1


def test_more_rows_take_larger_buffers():
    model = make_rectified().train()
    step = StaticStep(model, torch.optim.SGD(model.parameters(), lr=0.01))
    record = {"image": random_image(0), "hypothesis": torch.arange(4)}
    for images, rows in ((1, 16), (5, 32), (1, 32)):
        step.run([record] * images)
        assert step.rows == rows


def test_a_loss_that_is_not_finite_is_found_at_the_next_check():
    """Also if later losses are finite again."""
    data = batches(5)
    model = make_rectified()
    step = StaticStep(model.train(), torch.optim.SGD(model.parameters(), lr=0.01))
    step.run(data[0])
    step.check()
    tau, model.loss_tau = model.loss_tau, 1e-42
    step.run(data[1])
    model.loss_tau = tau
    step.run(data[2])
    with pytest.raises(ReclipError, match="is not finite"):
        step.check()


def test_metrics_are_written_when_losses_are_checked(caplog):
    _, storage = train(make_rectified(), batches(5), check_period=3)
    assert [iteration for _, iteration in storage.histories()["total_loss"].values()] == [2, 4]  # and in the last


def test_a_rate_in_a_tensor_is_as_good_as_a_number():
    """The fused optimizers of a graph read the rate from memory."""
    data, found = batches(3), []
    for tensor in (False, True):
        torch.manual_seed(0)
        model = make_rectified().train()
        rate = torch.tensor(0.02) if tensor else 0.02
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=tensor)
        loop = TrainLoop(model, data, optimizer)
        with EventStorage(0):
            for loop.iter in range(3):
                torch.manual_seed(loop.iter)
                loop.run_step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


REFUSALS = [
    ({"device_type": "cpu"}, "needs a GPU"),
    ({"processes": 2}, "several GPUs"),
    ({"accumulate_steps": 2}, "SOLVER.ACCUMULATE_STEPS"),
    ({"amp_dtype": torch.float16}, "set bfloat16"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
def test_what_has_no_graph(change, reason, monkeypatch):
    monkeypatch.setattr("reclip_d2.engine.static_step.kernels_enabled", lambda _: True)
    usual = {"device_type": "cuda", "processes": 1, "accumulate_steps": 1, "amp_dtype": torch.bfloat16}
    model = make_rectified()
    assert why_not_static(model, **usual) is None
    assert reason in why_not_static(model, **{**usual, **change})
    model.backbone.requires_grad_(True)
    assert "FINE_TUNE" in why_not_static(model, **usual)
    model.kernels = False
    assert "compiled kernels" in why_not_static(model, **usual)


def test_one_line_where_there_is_no_graph(caplog):
    cfg, model = load_config("", ["MODEL.DEVICE", "cpu"]), make_rectified()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        assert build_static_step(cfg, model, optimizer, None) is None
        assert caplog.text == ""
        cfg.SOLVER.CUDA_GRAPH = True
        assert build_static_step(cfg, model, optimizer, None) is None
    assert "SOLVER.CUDA_GRAPH: training without a graph: it needs a GPU" in caplog.text


def test_outputs_keep_no_autograd_graph():
    """Its nodes belong to a stream: a graph is captured with nodes made during the capture."""
    model = make_rectified().train()
    step = StaticStep(model, torch.optim.SGD(model.parameters(), lr=0.01))
    step.run(batches(1)[0])
    outputs = step.latest[1]
    tensors = [*outputs.losses.values(), *outputs.logits, outputs.bias]
    assert not any(x.requires_grad for x in tensors if x is not None)


@pytest.fixture
def reproducible(monkeypatch):
    """Convolutions in full precision, by algorithms that give the same result each time."""
    for name, value in (("allow_tf32", False), ("deterministic", True), ("benchmark", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def with_smooth_steps(model):
    """Soft masks: a hard mask may flip where two scores differ by rounding."""
    model.gumbel_hard = False
    return model


def with_rounding(model):
    """Weights that differ by about float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 2e-7 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_same_training(found, expected, other, optimizer="SGD"):
    """Up to 30 times what rounding changes in training, which ``other`` shows; of AdamW, whose updates do not shrink
    with the gradient, at least a hundredth of a step."""
    least = 2e-4 if optimizer == "AdamW" else 1e-6
    for key, want in expected.items():
        spread = (want.double() - other[key].double()).abs().amax() if want.numel() else 0.0
        assert torch.isfinite(want.double()).all()
        torch.testing.assert_close(
            found[key], want, rtol=1e-5, atol=least + 30 * float(spread), msg=lambda text, key=key: f"{key}: {text}"
        )


def trained_by_the_loop(model, data, device, optimizer):
    """Weights after training, and those from weights that differ by rounding."""
    models = copy.deepcopy(model), with_rounding(copy.deepcopy(model))
    return [train(copy.deepcopy(x), data, device, optimizer, static=False)[0] for x in models]


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_trains_as_the_loop_does(name, optimizer, reproducible, recwarn):
    if not kernels_available("cuda"):
        pytest.skip("no CUDA kernels")
    model, data = with_smooth_steps(MODELS[name]()), batches(8)
    loops = trained_by_the_loop(model, data, "cuda", optimizer)
    found, _ = train(copy.deepcopy(model), data, "cuda", optimizer)
    assert_same_training(found, *loops, optimizer)
    assert not [str(w.message) for w in recwarn if "stream does not match" in str(w.message)]


@pytest.mark.parametrize("fault", ["rate", "noise"])
def test_that_comparison_finds_faults(fault, monkeypatch):
    """A learning rate or noise that a graph would repeat."""
    model, data = with_smooth_steps(make_rectified()), batches(5)
    loops = trained_by_the_loop(model, data, "cpu", "SGD")
    assert_same_training(train(copy.deepcopy(model), data)[0], *loops)
    if fault == "noise":
        monkeypatch.setattr("reclip_d2.engine.static_step.draw_seed", lambda: torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_training(train(copy.deepcopy(model), data, decay=fault != "rate")[0], *loops)
