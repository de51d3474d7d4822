"""Do the runs that a suite lacks: each once, after those it depends on; interrupted ones resume."""

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

    A run that fails does not stop the others, except those that need it; but as long as none has succeeded, the first
    failure is the end: what is wrong then is likely wrong with all.

    Args:
        perform: does one run; called in threads.
        jobs: runs at a time.
        stop: ends the runs at work; called when this function is left by an error or by Ctrl-C.
        drop_checkpoints: remove the weights of finished runs that no pending run needs.

    Returns:
        one line for each run that failed or could not begin.
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
    """The result of a run, with when it ``started`` (seconds since 1970) and the ``seconds`` that it took."""
    started, start = time.time(), time.perf_counter()
    result = perform(planned.job, planned.folder.path / "output.txt")
    return {**result, "started": started, "seconds": time.perf_counter() - start}


class _Queue:
    """What is to be done, what is done, and what has failed."""

    def __init__(self, runs: Runs, jobs: int, drop_checkpoints: bool, say: Callable[[str], None]) -> None:
        self.runs = runs
        self.jobs = jobs
        self.drop_checkpoints = drop_checkpoints
        self.say = say
        self.waiting = runs.pending()
        self.unfinished = {planned.name for planned in self.waiting}
        self.total, self.ended = len(self.waiting), 0
        self.durations = Durations(runs.planned)
        self.succeeded = any(planned.folder.result for planned in runs.planned)
        self.failed: set[str] = set()
        self.failures: list[str] = []

    def next(self) -> Planned | None:
        """The next run whose teacher is there; None if all that wait need one that is not done."""
        for planned in list(self.waiting):
            teacher = planned.teacher.name if planned.teacher else ""
            if teacher in self.failed:
                self.waiting.remove(planned)
                self._fail(planned, f"not run, since {teacher} failed")
            elif teacher not in self.unfinished:
                self.waiting.remove(planned)
                return planned
        return None

    def take_in(self, planned: Planned, future: Future[dict[str, Any]]) -> None:
        """Keep the result of a run, or why it failed."""
        self.unfinished.discard(planned.name)
        try:
            result = future.result()
        except ReclipError as error:
            planned.folder.fail(str(error))
            if not self.succeeded:
                raise ReclipError(f"run {planned.name}: {error}") from error
            self._fail(planned, f"failed: {error}")
        except RuntimeError as error:  # a bug of ours
            output = planned.folder.path / "output.txt"
            message = f"{str(error).strip().splitlines()[-1]} (all of it: {output})"
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
        """How long the runs that are left will take; those at work count half."""
        if not self.unfinished:
            return "all done"
        waiting = {planned.name for planned in self.waiting}
        at_work = [p for p in self.runs.planned if p.name in self.unfinished and p.name not in waiting]
        ahead, begun = self.durations.estimate(self.waiting), self.durations.estimate(at_work)
        if ahead is None or begun is None:
            return f"{len(self.unfinished)} runs left"
        return f"about {duration_in_words((ahead + begun / 2) / self.jobs)} left"

    def _drop_unneeded(self) -> None:
        """Remove the weights of finished runs that none of the unfinished needs."""
        needed = {p.teacher.name for p in self.runs.planned if p.teacher and p.name in self.unfinished}
        for planned in self.runs.planned:
            if planned.name not in needed | self.unfinished and planned.folder.result is not None:
                planned.folder.drop_checkpoints()


def describe(runs: Runs, planned: Planned) -> dict[str, Any]:
    """Head of a run's result: what it is."""
    experiment = planned.run.experiment
    return {
        "experiment": experiment.key,
        "title": experiment.title,
        "seed": planned.run.seed,
        "suite": runs.suite.name,
        "kind": experiment.kind,
        "config_files": [
            str(Path("configs", *Path(file).parts[-2:])) for file in runs.suite.config_files(experiment.config)
        ],
        "overrides": planned.overrides,
        "options": list(runs.settings.options),
        "teacher": planned.teacher.name if planned.teacher else "",
        "fingerprint": planned.fingerprint,
    }


class Durations:
    """Seconds that runs took, those of earlier starts of the program among them."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        """
        Args:
            planned: the suite's runs; those that are done say how long they took.
        """
        self._seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for run in planned:
            result = run.folder.result
            if result and not (result["training"] or {}).get("first_iteration"):  # of a resumed run a part is missing
                self.add(run, result["seconds"])

    def add(self, planned: Planned, seconds: float) -> None:
        """Remember how long a run took."""
        for key in self._keys(planned):
            self._seconds[key].append(seconds)

    def estimate(self, planned: Sequence[Planned]) -> float | None:
        """Seconds that these runs will take: as long as others of the same experiment, or of the same config file, or
        of the same kind, whatever is known first; None if nothing is."""
        total = 0.0
        for run in planned:
            known = next((self._seconds[key] for key in self._keys(run) if key in self._seconds), None)
            if known is None:
                return None
            total += statistics.median(known)
        return total

    @staticmethod
    def _keys(planned: Planned) -> list[tuple[str, ...]]:
        """From the most to the least like."""
        experiment = planned.run.experiment
        return [
            ("experiment", experiment.key),
            ("config", experiment.kind, experiment.config),
            ("kind", experiment.kind),
            (),
        ]
