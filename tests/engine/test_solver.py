"""The optimizer, and the poly schedule value by value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reclip_d2.config import load_config
from reclip_d2.engine.solver import build_lr_scheduler, build_optimizer
from reclip_d2.errors import ReclipError


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return model


def test_sgd_of_the_papers_is_the_default() -> None:
    optimizer = build_optimizer(load_config(""), _model())
    assert type(optimizer).__name__.startswith("SGD")
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}


def test_adamw_takes_rate_and_decays_and_leaves_frozen_parameters_out() -> None:
    opts = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.002, "SOLVER.WEIGHT_DECAY", 0.1]
    model = _model()
    optimizer = build_optimizer(load_config("", [*opts, "SOLVER.WEIGHT_DECAY_NORM", 0.0]), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {0.002}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): 0.1 for p in model[0].parameters()} | {id(p): 0.0 for p in model[1].parameters()}


def test_adamw_clips_gradients_as_configured() -> None:
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"]
    cfg = load_config("", ["SOLVER.OPTIMIZER", "AdamW", *clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5])
    model = _model()
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    optimizer.step()
    assert float(model[0].weight.grad.max()) == 0.5


def test_unknown_optimizer() -> None:
    with pytest.raises(ReclipError, match="SOLVER.OPTIMIZER is 'Lion'; choose one of SGD, AdamW"):
        load_config("", ["SOLVER.OPTIMIZER", "Lion"])


# ---- the schedule --------------------------------------------------------------------------------------------------


def schedule(*keys: object, steps: int = 10, base: float = 0.01) -> list[float]:
    """Learning rates of the first ``steps`` iterations."""
    cfg = load_config("", ["SOLVER.MAX_ITER", "10", "SOLVER.BASE_LR", str(base), *map(str, keys)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_poly_by_hand():
    """0.01 * (1 - i / 10) ** 0.9."""
    rates = schedule()
    assert rates[0] == 0.01
    assert rates[5] == pytest.approx(0.005358867, rel=1e-6)
    assert rates[9] == pytest.approx(0.001258925, rel=1e-6)
    assert rates == pytest.approx([0.01 * (1 - i / 10) ** 0.9 for i in range(10)])


def test_power_is_a_key():
    assert schedule("SOLVER.POLY_POWER", 2.0) == pytest.approx([0.01 * (1 - i / 10) ** 2 for i in range(10)])


def test_linear_warm_up_joins_the_poly_curve():
    """Four iterations from 0.1 of the rate up to the poly value at their end."""
    rates = schedule("SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.1, "SOLVER.WARMUP_METHOD", "linear", base=1.0)
    end = (1 - 4 / 10) ** 0.9
    assert rates[:4] == pytest.approx([0.1 + (end - 0.1) * i / 4 for i in range(4)])
    assert rates[4:] == pytest.approx([(1 - i / 10) ** 0.9 for i in range(4, 10)])


def test_a_warm_up_longer_than_the_run_is_cut():
    rates = schedule("SOLVER.WARMUP_ITERS", 100, "SOLVER.WARMUP_FACTOR", 0.5)
    assert all(torch.isfinite(torch.tensor(rates))) and rates[0] == pytest.approx(0.005)


def test_other_names_are_detectron2s():
    rates = schedule("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(5,)", "SOLVER.GAMMA", 0.1)
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5)


def test_state_round_trip():
    cfg = load_config("", ["SOLVER.MAX_ITER", "10"])
    rates = []
    state = None
    for start in (0, 4):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        scheduler = build_lr_scheduler(cfg, optimizer)
        if state is not None:
            scheduler.load_state_dict(state)
        for _ in range(start, start + 4):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        state = scheduler.state_dict()
    assert rates == pytest.approx([0.01 * (1 - i / 10) ** 0.9 for i in range(1, 9)])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_on_a_gpu_an_update_is_fused_and_the_same(name: str) -> None:
    cfg = load_config("", ["SOLVER.OPTIMIZER", name])
    torch.manual_seed(0)
    # Without a norm: the gradient of a bias before one is rounding alone, and AdamW divides it by its size.
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device) for device in ("cpu", "cuda")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = build_optimizer(cfg, model)
        assert all(bool(group.get("fused")) == (model is models[1]) for group in optimizer.param_groups)
        for step in range(3):
            optimizer.zero_grad()
            inputs = torch.linspace(-1, 1, 15).view(5, 3).to(model[0].weight.device) * (step + 1)
            model(inputs).square().sum().backward()
            optimizer.step()
    for found, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-5)
