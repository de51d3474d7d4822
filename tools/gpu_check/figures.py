"""Shared by the timing programs: output of figures, time limit, ceilings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


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
