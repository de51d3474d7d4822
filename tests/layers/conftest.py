"""Fixtures of the operator tests: the device, which implementation runs, and random inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from reclip_d2.layers import _extension, kernels_available, use_kernels


class Sample(NamedTuple):
    """Inputs of the pooling operators; logits as a convolution leaves them: a permuted view of (B, C, n)."""

    logits: Tensor
    bias: Tensor
    features: Tensor
    class_ids: Tensor
    offsets: Tensor
    seed: Tensor


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test runs on."""
    return torch.device(request.param)


_skipped: Counter[str] = Counter()  # reason -> tests


def need_kernels(device_type: str) -> None:
    """Skip the test where the extension was left out, or built without CUDA; fail where it cannot be loaded."""
    if kernels_available(device_type):
        return
    if _extension._problem not in (None, _extension.NOT_BUILT):
        pytest.fail(f"the extension reclip_d2._C {_extension._problem}")
    reason = f"no {device_type} kernels in this environment (pip install -e . --no-build-isolation builds them)"
    _skipped[reason] += 1
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report once why tests were skipped, where pytest has one line per test."""
    for reason, count in _skipped.items():
        terminalreporter.write_line(f"{count} tests of tests/layers skipped: {reason}")


@pytest.fixture
def kernels(device: torch.device):
    """Make sure that the compiled kernels are the ones that run."""
    need_kernels(device.type)
    with use_kernels(True):
        yield


@pytest.fixture(params=["twin", "kernel"])
def implementation(request: pytest.FixtureRequest, device: torch.device):
    """Run the test once with the plain-PyTorch twins and once with the compiled kernels."""
    if request.param == "kernel":
        need_kernels(device.type)
    with use_kernels(request.param == "kernel"):
        yield request.param


@pytest.fixture
def make_sample(device: torch.device) -> Callable[..., Sample]:
    """A function that draws random inputs with a hypothesis of ``rows`` classes, fewer for later images."""

    def make(
        classes: int,
        patches: int,
        width: int,
        rows: int,
        dtype: torch.dtype = torch.float32,
        images: int = 3,
    ) -> Sample:
        generator = torch.Generator().manual_seed(classes * 7919 + patches * 31 + width)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        counts = [min(rows // (image + 1) if image else rows, classes) for image in range(images)]
        ids = [torch.randperm(classes, generator=generator)[:count] for count in counts]
        bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return Sample(
            logits=normal(images, classes, patches).to(device, dtype).transpose(1, 2),
            bias=normal(classes, patches).to(device, bias_dtype).t(),
            features=normal(images, patches, width).to(device, dtype),
            class_ids=torch.cat(ids),
            offsets=torch.tensor([0, *counts]).cumsum(0),
            seed=torch.tensor([classes, patches]),
        )

    return make
