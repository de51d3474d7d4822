"""The steps of the GPU check, most important first.

Each step is a separate program. It may write its figures as JSON to the file in the environment variable
``GPU_CHECK_FIGURES``, repeatedly while it runs: the last state is kept, even if the step is killed. A program that ran
out of time exits with ``figures.MORE_TO_DO``; the next run starts it again, and it resumes from its figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Beside those of the operators, whose tests run on the CPU too, the tests of what only a GPU does.
TESTS = (
    "tests/layers",
    "tests/engine/test_solver.py",
    "tests/engine/test_static_step.py",
    "tests/engine/test_train_loop.py",
    "tests/export/test_export.py",
    "tests/features/test_resident.py",
    "tests/inference/test_predictor.py",
    "tests/cli/test_segment.py",
    "tests/test_errors.py",
)
# Kernels to profile: both passes of hard masks at 150 classes, a label map, the losses of distillation.
PROFILED = "peaks|pool_hard|row_gradient|patch_totals|logit_gradient|upsample_"

# Steps of this group run in parallel: none of them is timed.
CORRECTNESS = "correctness"
_SM90 = {"TORCH_CUDA_ARCH_LIST": "9.0"}


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: letters, digits, '-' and '_'; also the name of its log.
        command: the program and its arguments, run in the root of the checkout.
        seconds: time limit of the step.
        needs: names of steps that must have passed; otherwise it is not tried.
        group: consecutive steps with the same group run in parallel.
        environment: variables in addition to the caller's.
        always: run even if it has passed, since the next run may be on another machine.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    group: str = ""
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    always: bool = False


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"tools.gpu_check.{name}", *arguments)


def plan(device: str) -> list[Step]:
    """The steps for ``cuda``, or small ones for a dry run on the ``cpu``, without those that need a GPU.

    On ``cuda`` the limits add up to more than 8 minutes, since most steps end long before theirs.
    """
    if device == "cuda":
        return [
            Step("ceilings", _module("ceilings", "--device", "cuda"), 60),
            Step(
                "build",
                ("bash", "tools/gpu_check/build.sh"),
                150,
                environment=_SM90,
                always=True,
            ),
            Step("tests", _pytest(TESTS, "cuda and not slow", "-n", "6"), 120, ("build",), CORRECTNESS),
            *(_sanitizer(tool) for tool in SANITIZERS),
            Step("compile", ("bash", "tools/gpu_check/compile_elsewhere.sh"), 180, ("build",), CORRECTNESS, _SM90),
            Step("kernels", _module("kernel_times", "--device", "cuda", "--seconds", "100"), 120, ("build",)),
            Step("whole_step", _module("whole_step", "--device", "cuda", "--seconds", "80"), 100, ("build",)),
            Step("profiler", _profiler(), 45, ("build",)),
        ]
    return [
        Step("ceilings", _module("ceilings", "--device", "cpu"), 60),
        Step("build", ("bash", "tools/gpu_check/build.sh"), 60, environment={"GPU_CHECK_BUILD": "no"}, always=True),
        Step("tests", _pytest(TESTS[:1], "not cuda and not slow", "-k", "philox or hand"), 300, ("build",)),
        Step("operator_calls", _module("operator_calls", "--device", "cpu"), 120, ("build",)),
        Step("kernels", _module("kernel_times", "--device", "cpu", "--seconds", "120"), 240, ("build",)),
        Step("whole_step", _module("whole_step", "--device", "cpu", "--seconds", "150"), 300, ("build",)),
    ]


def _pytest(tests: Sequence[str], markers: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", *tests, "-m", markers, "-q", "-p", "no:cacheprovider", *arguments)


def _sanitizer(tool: str) -> Step:
    # Without PyTorch's cache each tensor has a separate allocation, so that out-of-bounds accesses are detected.
    command = (
        "compute-sanitizer",
        "--tool",
        tool,
        "--target-processes",
        "all",
        "--error-exitcode",
        "9",
        *_module("operator_calls"),
    )
    return Step(
        f"sanitizer_{tool}",
        (*command, "--device", "cuda"),
        120,
        ("build",),
        CORRECTNESS,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _profiler() -> tuple[str, ...]:
    # The clocks are not changed; there is no report file, the figures go to the log.
    return (
        "ncu", "--clock-control", "none", "--target-processes", "all", "--launch-count", "12",
        "--kernel-name", f"regex:{PROFILED}",
        "--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy",
        "--section", "LaunchStats", *_module("operator_calls", "--device", "cuda", "--only", "profile"),
    )  # fmt: skip
