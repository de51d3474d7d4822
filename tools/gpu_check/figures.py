"""Shared by the timing programs: output of figures, time limit, ceilings, and timing with device events."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reclip_d2.utils.timing import synchronize, timed


def write_figures(figures: dict[str, Any]) -> None:
    """Write the figures of a step atomically to the file that the runner names; without a runner, do nothing."""
    path = os.environ.get("GPU_CHECK_FIGURES")
    if path:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(figures))
        temporary.replace(path)


def read_figures() -> dict[str, Any]:
    """The figures of an earlier, incomplete run of the step; empty if there are none."""
    try:
        return json.loads(Path(os.environ["GPU_CHECK_FIGURES"]).read_text())
    except (KeyError, OSError, ValueError):
        return {}


def read_ceilings() -> dict[str, float]:
    """The ceilings measured by the first step; empty if there are none."""
    try:
        return json.loads(Path(os.environ["GPU_CHECK_CEILINGS"]).read_text())
    except (KeyError, OSError, ValueError):
        return {}


# Exit status of a program that ran out of time: it is run again, and resumes from its figures.
MORE_TO_DO = 75


class Clock:
    """The time left to a program."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def median_seconds(function: Callable[[int], Any], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Median seconds of ``repeats`` calls; the function gets the number of the call, to rotate its inputs."""
    for call in range(warmup):
        function(call)
    synchronize(device)
    return statistics.median(timed(lambda call=call: function(call), device) for call in range(repeats))


def host_seconds(function: Callable[[int], Any], device: torch.device, calls: int) -> float:
    """Host seconds per call: ``calls`` calls are queued without waiting for the device."""
    function(0)
    synchronize(device)
    begin = time.perf_counter()
    for call in range(calls):
        function(call)
    seconds = (time.perf_counter() - begin) / calls
    synchronize(device)
    return seconds


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call adds to the peak of PyTorch's GPU allocations; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
