"""Shared by all tests: no network, few threads, fixed seeds, and no CUDA tests without a CUDA device."""

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before any import of the hub's client, which reads it once: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

MAX_THREADS = 2


def pytest_configure(config: pytest.Config) -> None:
    """Bound PyTorch's threads: the tests' tensors are small, and many threads get in each other's way."""
    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``cuda`` if there is no CUDA device."""
    if torch.cuda.is_available():
        return
    deselected = [item for item in items if item.get_closest_marker("cuda")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and PyTorch before each test, so that no test depends on those before it."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Loggers as they were before the test: programs give them handlers and levels, and cut them off from pytest's."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "reclip_d2", "py.warnings")]
    before = [(one, one.level, one.propagate, list(one.handlers)) for one in loggers]
    yield
    for one, level, propagate, handlers in before:
        for handler in set(one.handlers) - set(handlers):
            handler.close()
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)
    logging.getLogger("detectron2.engine.train_loop").filters.clear()
    if detectron2_logger := sys.modules.get("detectron2.utils.logger"):
        detectron2_logger.setup_logger.cache_clear()


@pytest.fixture
def datasets_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that DETECTRON2_DATASETS names during the test."""
    root = tmp_path / "datasets"
    root.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root
