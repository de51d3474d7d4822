"""What the timing programs share: where figures go, the time limit, ceilings, and timing by device events."""

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
    """Write the figures of a step, whole, to the file that the runner names; without a runner, nowhere."""
    path = os.environ.get("GPU_CHECK_FIGURES")
    if path:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(figures))
        temporary.replace(path)


def read_figures() -> dict[str, Any]:
    """The figures that an earlier run of the step has written and could not complete; empty if there are none."""
    try:
        return json.loads(Path(os.environ["GPU_CHECK_FIGURES"]).read_text())
    except (KeyError, OSError, ValueError):
        return {}


def read_ceilings() -> dict[str, float]:
    """The ceilings that the first step has measured; empty if there are none."""
    try:
        return json.loads(Path(os.environ["GPU_CHECK_CEILINGS"]).read_text())
    except (KeyError, OSError, ValueError):
        return {}


# Exit status of a program that had no time for all of its parts: it is run again, and finds its figures.
MORE_TO_DO = 75


class Clock:
    """How much of a program's time is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def median_seconds(function: Callable[[int], Any], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """The median of ``repeats`` calls; the function gets the number of the call, to take its inputs in turn."""
    for call in range(warmup):
        function(call)
    synchronize(device)
    return statistics.median(timed(lambda call=call: function(call), device) for call in range(repeats))


def host_seconds(function: Callable[[int], Any], device: torch.device, calls: int) -> float:
    """Seconds a call for which the host is busy: ``calls`` of them are queued without waiting for the device."""
    function(0)
    synchronize(device)
    begin = time.perf_counter()
    for call in range(calls):
        function(call)
    seconds = (time.perf_counter() - begin) / calls
    synchronize(device)
    return seconds


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """What a call adds to PyTorch's allocations on the GPU at their peak; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
