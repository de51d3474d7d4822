"""Do a suite's pending runs, each after those it depends on; interrupted runs resume."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from reclip_d2.errors import ReclipError
from reclip_d2.experiments.plan import Job, Planned, Runs
from reclip_d2.utils.progress import duration_in_words

Perform = Callable[[Job, Path], dict[str, Any]]
"""``(job, output file) -> result``, see ``execute.perform``; raises :class:`ReclipError` for a run that failed."""


def run_pending(
    runs: Runs,
    perform: Perform,
    *,
    jobs: int = 1,
    stop: Callable[[], None] = lambda: None,
    drop_checkpoints: bool = False,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Do all pending runs, one line each.

    A failed run does not stop the others, except those that need it. But if it fails before any run has succeeded, the
    suite stops, since the cause is likely common to all.

    Args:
        perform: does one run; called in threads.
        jobs: number of parallel runs.
        stop: stops active runs; called if this function is left by an error or Ctrl-C.
        drop_checkpoints: remove the weights of finished runs that no pending run needs.

    Returns:
        One line for each run that failed or could not begin.
    """
    queue = _Queue(runs, jobs, drop_checkpoints, say)
    with ThreadPoolExecutor(jobs) as pool:
        working: dict[Future[dict[str, Any]], Planned] = {}
        try:
            while True:
                while len(working) < jobs and (planned := queue.next()) is not None:
                    planned.folder.begin(planned.settings)
                    working[pool.submit(_timed, perform, planned)] = planned
                if not working:
                    return queue.failures
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    queue.take_in(working.pop(future), future)
        except BaseException:
            stop()
            raise


def _timed(perform: Perform, planned: Planned) -> dict[str, Any]:
    """The result of a run, with its start time ``started`` (seconds since 1970) and its duration ``seconds``."""
    started, start = time.time(), time.perf_counter()
    result = perform(planned.job, planned.folder.path / "output.txt")
    return {**result, "started": started, "seconds": time.perf_counter() - start}


class _Queue:
    """The pending, finished and failed runs."""

    def __init__(self, runs: Runs, jobs: int, drop_checkpoints: bool, say: Callable[[str], None]) -> None:
        self.runs = runs
        self.jobs = jobs
        self.drop_checkpoints = drop_checkpoints
        self.say = say
        self.waiting = runs.pending()
        self.unfinished = {planned.name for planned in self.waiting}
        self.total, self.ended = len(self.waiting), 0
        self.durations = Durations(runs)
        self.succeeded = any(planned.folder.result for planned in runs.planned)
        self.failed: set[str] = set()
        self.failures: list[str] = []

    def next(self) -> Planned | None:
        """The next run whose teacher and CLIP are finished; None if all pending runs wait for one."""
        for planned in list(self.waiting):
            needs = [needed.name for needed in planned.needs]
            if failed := [name for name in needs if name in self.failed]:
                self.waiting.remove(planned)
                self._fail(planned, f"not run, since {failed[0]} failed")
            elif not self.unfinished.intersection(needs):
                self.waiting.remove(planned)
                return planned
        return None

    def take_in(self, planned: Planned, future: Future[dict[str, Any]]) -> None:
        """Record the result of a run, or why it failed."""
        self.unfinished.discard(planned.name)
        try:
            result = future.result()
        except ReclipError as error:
            planned.folder.fail(str(error))
            if not self.succeeded:
                raise ReclipError(f"run {planned.name}: {error}") from error
            self._fail(planned, f"failed: {error}")
        except RuntimeError as error:  # a bug in this project
            output = planned.folder.path / "output.txt"
            message = f"{str(error).strip().splitlines()[-1]} (details: {output})"
            planned.folder.fail(message)
            if not self.succeeded:
                raise
            self._fail(planned, f"failed: {message}")
        else:
            self.succeeded = True
            planned.folder.finish({**describe(self.runs, planned), **result})
            self.durations.add(planned, result["seconds"])
            score = f"mIoU {result['metrics']['mIoU']:.1f}" if "mIoU" in result["metrics"] else "done"
            self._end(planned, f"{score} in {result['seconds']:.0f} s; {self._remaining()}")
            if self.drop_checkpoints:
                self._drop_unneeded()

    def _fail(self, planned: Planned, message: str) -> None:
        self.unfinished.discard(planned.name)
        self.failed.add(planned.name)
        self.failures.append(f"{planned.name}: {message}")
        self._end(planned, message)

    def _end(self, planned: Planned, message: str) -> None:
        self.ended += 1
        self.say(f"[{self.ended:{len(str(self.total))}d}/{self.total}] {planned.name}: {message}")

    def _remaining(self) -> str:
        """Estimated time of the remaining runs; active runs count half."""
        if not self.unfinished:
            return "all done"
        waiting = {planned.name for planned in self.waiting}
        at_work = [p for p in self.runs.planned if p.name in self.unfinished and p.name not in waiting]
        ahead, begun = self.durations.estimate(self.waiting), self.durations.estimate(at_work)
        if ahead is None or begun is None:
            return f"{len(self.unfinished)} runs left"
        return f"about {duration_in_words((ahead + begun / 2) / self.jobs)} left"

    def _drop_unneeded(self) -> None:
        """Remove the weights of finished runs that no unfinished run needs."""
        needed = {p.teacher.name for p in self.runs.planned if p.teacher and p.name in self.unfinished}
        for planned in self.runs.planned:
            if planned.name not in needed | self.unfinished and planned.folder.result is not None:
                planned.folder.drop_checkpoints()


def describe(runs: Runs, planned: Planned) -> dict[str, Any]:
    """Header of a run's result."""
    experiment = planned.run.experiment
    return {
        "experiment": experiment.key,
        "condition": planned.run.condition.key,
        "title": experiment.title,
        "seed": planned.run.seed,
        "suite": runs.suite.name,
        "kind": experiment.kind,
        "config_files": [str(Path("configs", *Path(file).parts[-2:])) for file in planned.job.config_files],
        "overrides": planned.overrides,
        "options": list(runs.settings.options),
        "teacher": planned.teacher.name if planned.teacher else "",
        "fingerprint": planned.fingerprint,
    }


class Durations:
    """Durations of runs: those of this and earlier invocations, or else the suite file's."""

    def __init__(self, runs: Runs) -> None:
        """
        Args:
            runs: the suite's runs; finished ones provide durations.
        """
        self._listed = runs.suite.seconds
        self._seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for run in runs.planned:
            result = run.folder.result
            if result and not (result["training"] or {}).get("first_iteration"):  # resumed runs lack a part
                self.add(run, result["seconds"])

    def add(self, planned: Planned, seconds: float) -> None:
        """Record how long a run took."""
        for key in (*self._near(planned), *self._far(planned)):
            self._seconds[key].append(seconds)

    def estimate(self, planned: Sequence[Planned]) -> float | None:
        """Estimated seconds of these runs: as long as other runs of the same experiment, else of the same config file,
        else as the suite file says, else as long as runs of the same kind; None if unknown."""
        total = 0.0
        for run in planned:
            seconds = self._measured(self._near(run)) or self._from_file(run) or self._measured(self._far(run))
            if seconds is None:
                return None
            total += seconds
        return total

    def _measured(self, keys: Sequence[tuple[str, ...]]) -> float | None:
        return next((statistics.median(self._seconds[key]) for key in keys if key in self._seconds), None)

    def _from_file(self, planned: Planned) -> float | None:
        experiment = planned.run.experiment
        kind_first = experiment.inherits or experiment.kind == "hypotheses"  # their config is that of another run
        names = [experiment.key, *((experiment.kind,) if kind_first else (experiment.config, experiment.kind))]
        return next((self._listed[name] for name in names if name in self._listed), None)

    @staticmethod
    def _near(planned: Planned) -> list[tuple[str, ...]]:
        """Runs with about the same duration, from most to least similar."""
        experiment = planned.run.experiment
        return [("experiment", experiment.key), ("config", experiment.kind, experiment.config)]

    @staticmethod
    def _far(planned: Planned) -> list[tuple[str, ...]]:
        return [("kind", planned.run.experiment.kind), ()]


def estimated_time(runs: Runs, jobs: int) -> str:
    """The number of pending runs and the time that they will take, in words."""
    pending = runs.pending()
    seconds = Durations(runs).estimate(pending)
    count = f"{len(pending)} runs" if len(pending) != 1 else "1 run"
    if not pending or seconds is None:
        return f"{count} to do"
    # With fewer processes than runs the sum is shared evenly; a single run is not shared.
    return f"{count} to do, about {duration_in_words(seconds / min(jobs, len(pending)))} on {jobs} processes"
