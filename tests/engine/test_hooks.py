"""Trainer hooks and the log filter."""

import logging
from types import SimpleNamespace

import torch
from detectron2.utils import comm

from reclip_d2.engine.hooks import SeedIteration
from reclip_d2.engine.logs import UserErrorFilter
from reclip_d2.errors import ReclipError


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


def record(error: BaseException | None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord("detectron2", logging.ERROR, __file__, 1, "Exception during training:", (), info)


def test_a_users_mistake_is_kept_out_of_the_log_and_nothing_else():
    keep = UserErrorFilter().filter
    assert not keep(record(ReclipError("a clear line")))
    assert keep(record(ValueError("a bug")))
    assert keep(record(None))
