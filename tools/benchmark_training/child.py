"""Runs ``reclip`` in a process of its own, and measures it: total seconds, peak memory, seconds by stage.

    python -m tools.benchmark_training.child REQUEST.json

The request names the call (``segment`` or ``predict``) and its arguments; the figures are written next to it. The
process starts before any import of PyTorch, so that the total is what a user waits for.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reclip_d2.errors import ReclipError
from reclip_d2.utils.progress import Progress

FIRST_STAGE = "start"


class StageClock:
    """A listener of progress that adds up the seconds of each stage, by the name of the stage.

    Attributes:
        seconds: by stage, in the order in which they begin.
        estimate: the first estimate of the whole run, in seconds; None if there was none.
        estimated_at: when it came, in seconds since the start of the clock.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._begin = self._last = now()
        self._stage = FIRST_STAGE
        self.seconds: dict[str, float] = {}
        self.estimate: float | None = None
        self.estimated_at = 0.0

    def __call__(self, event: Progress) -> None:
        if event.total or not event.message or event.stage == "estimate":  # others are notes
            self.enter(event.stage)
        if event.stage == "estimate" and event.seconds_left is not None and self.estimate is None:
            self.estimate, self.estimated_at = event.seconds_left, self._now() - self._begin

    def enter(self, stage: str) -> str:
        """Begin a stage, and end the current one, whose name is returned."""
        now, former = self._now(), self._stage
        self.seconds[former] = self.seconds.get(former, 0.0) + now - self._last
        self._last, self._stage = now, stage
        return former

    def total(self) -> float:
        """Seconds since the start of the clock."""
        return self._now() - self._begin


def time_texts(clock: StageClock) -> None:
    """Count the encoding of class names, which happens inside of several stages, as the stage ``texts``."""
    from reclip_d2.backbones import query

    encode = query.query_features

    def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        former = clock.enter("texts")
        try:
            return encode(*arguments, **options)
        finally:
            clock.enter(former)

    query.query_features = timed


def run_segment(arguments: dict[str, Any], clock: StageClock) -> dict[str, Any]:
    """``reclip segment`` with options; returns its stages and its estimate."""
    from reclip_d2.workspace.options import SegmentOptions
    from reclip_d2.workspace.segment import segment

    time_texts(clock)
    options = SegmentOptions(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments["options"].items()})
    segment(arguments["images"], arguments["classes"], arguments["output"], options, progress=clock)
    clock.enter("")
    figures: dict[str, Any] = {"stages": clock.seconds}
    if clock.estimate is not None:
        truth = clock.total() - clock.estimated_at
        figures |= {"estimate": clock.estimate, "after_estimate": truth, "estimate_ratio": clock.estimate / truth}
    return figures


def run_predict(arguments: dict[str, Any], clock: StageClock) -> dict[str, Any]:
    """``reclip predict`` with options; returns its stages."""
    from reclip_d2.workspace.options import PredictOptions
    from reclip_d2.workspace.predict import predict

    options = PredictOptions(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments["options"].items()})
    predict(arguments["images"], arguments["model"], arguments["output"], options, progress=clock)
    clock.enter("")
    return {"stages": clock.seconds}


def measure(call: str, arguments: dict[str, Any], folder: Path, environment: dict[str, str] | None = None) -> dict:
    """Run a call in a fresh process.

    Args:
        call: ``segment`` or ``predict``.
        arguments: of the call, JSON values.
        folder: of the request, the figures and the log.
        environment: additional variables.

    Returns:
        its figures, ``seconds`` from the start to the end of the process, and ``peak_bytes``, its peak resident set.

    Raises:
        ReclipError: the call failed; the message is the last line of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / f"{call}.json"
    request.write_text(json.dumps({"call": call, **arguments}))
    command = [sys.executable, "-m", "tools.benchmark_training.child", str(request)]
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    begin = time.perf_counter()
    with open(folder / f"{call}.log", "wb") as log:
        variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
        done = subprocess.run(command, stdout=log, stderr=log, env=variables, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        lines = (folder / f"{call}.log").read_text(errors="replace").strip().splitlines()
        raise ReclipError(f"reclip {call} failed: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return {"seconds": seconds, **json.loads(request.with_suffix(".figures.json").read_text())}


def main() -> None:
    """Run the request."""
    clock = StageClock()
    request = Path(sys.argv[1])
    arguments = json.loads(request.read_text())
    run = {"segment": run_segment, "predict": run_predict}[arguments["call"]]
    figures = run(arguments, clock)
    from reclip_d2.utils.measuring import status_bytes

    figures["peak_bytes"] = status_bytes("VmHWM")
    request.with_suffix(".figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
