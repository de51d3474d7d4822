"""Measuring, shared by the benchmarks and the GPU check: seconds of calls that take turns, peak memory, the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from reclip_d2.utils.timing import synchronize, timed


def take_turns(runs: Mapping[str, Callable[[int], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each function, which take turns, so that drifts of the machine affect all alike.

    Args:
        runs: functions by name; each gets the number of the turn, counted over all functions, to rotate its inputs.
    """
    synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turn = 0
    for _ in range(repeats):
        for name, run in runs.items():
            turn += 1
            seconds[name].append(timed(lambda run=run, turn=turn: run(turn), device))
    return seconds


def median_seconds(function: Callable[[int], Any], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Median seconds of ``repeats`` calls; the function gets the number of the call, to rotate its inputs."""
    for call in range(warmup):
        function(call)
    return statistics.median(take_turns({"": function}, device, repeats)[""])


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


def resident_peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes that a call adds to the peak resident set of this process, of Linux."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: free memory of earlier calls returns to the system
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = status_bytes("VmHWM")
    function()
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    """A size in /proc/self/status, such as ``VmRSS``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and settings that figures depend on."""
    report = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        return {**report, "processor": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {**report, "processor": f"{model} ({platform.machine()})", "cores": os.cpu_count()}
