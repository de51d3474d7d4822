"""Tests of ``reclip_d2.engine.optimizer``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reclip_d2.config import load_config
from reclip_d2.engine.optimizer import build_optimizer
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
