"""Progress of long work: events of a stage, their listeners, and progress bars.

Library code counts steps and prints nothing::

    with count_steps("hypotheses", total=len(images)) as steps:
        for image in images:
            ...
            steps.advance()

The caller chooses the listener, like ``EventStorage`` for Detectron2's metrics::

    with report_to(print):        # hypotheses: 40 of 120 images (33 %), about 25 s left
        generate_hypotheses(...)

Without :func:`report_to`, progress appears on standard error: bars in a terminal, lines elsewhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Steps are reported if the last report is at least this many seconds old, and ...
_SHORTEST_GAP = 0.1
# ... another hundredth of the stage is done, or this many seconds have passed.
_LONGEST_GAP = 10.0
# In a log, a stage has a line at its end, and one whenever this many seconds have passed.
_LINES_GAP = 30.0
# Estimates weigh steps by their age: those of this many seconds ago have 1/e of the weight of the latest.
_MEMORY = 60.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """An event: a stage begins, has a message, or has done some of its steps.

    ``str(event)`` is a readable line, so ``print`` is a listener.

    Attributes:
        stage: what is being done, such as ``hypotheses``.
        done: finished steps.
        total: total steps; 0 if the event is not a count but a beginning or a message.
        unit: what a step is, in the singular.
        message: additional text, such as the loss; "" for none.
        seconds_left: estimate for this stage; None if unknown.
        ended: no further counts of this stage follow: it is done, or has failed.
    """

    stage: str
    done: int = 0
    total: int = 0
    unit: str = "image"
    message: str = ""
    seconds_left: float | None = None
    ended: bool = False

    def __str__(self) -> str:
        if not self.total:
            return f"{self.stage}: {self.message}" if self.message else f"{self.stage} ..."
        share = f"{self.done:,} of {self.total:,} {_plural(self.unit, self.total)} ({100 * self.done // self.total} %)"
        left = "" if self.seconds_left is None else f"about {duration_in_words(self.seconds_left)} left"
        return ", ".join(filter(None, [f"{self.stage}: {share}", self.message, left]))


ProgressCallback = Callable[[Progress], Any]
"""A listener: called with each event, in the working thread. Exceptions that it raises end the work."""


def _plural(unit: str, count: int) -> str:
    return unit if count == 1 or unit.isupper() or unit.endswith("iB") else f"{unit}s"


def duration_in_words(seconds: float, step: int = 10) -> str:
    """A duration: ``40 s``, ``12 min``, ``3 h 20 min`` (in steps of ``step`` minutes), ``2 days 4 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(round(minutes / step) * step, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


class ProgressBars:
    """A listener for standard error: one bar per stage, by rich, in a terminal; otherwise lines, when a stage ends and
    every 30 s of it, as in a log. Events that are not counts are ignored."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._last_line = -math.inf

    def __call__(self, event: Progress) -> None:
        if not event.total:
            self.close()
            return
        if sys.stderr is None:
            return
        if not _is_interactive():
            self._write_line(event)
            return
        if self._bar is None or self._stage != event.stage:
            self.close()
            self._open(event)
        left = "" if event.seconds_left is None else f"about {duration_in_words(event.seconds_left)} left"
        counts = f"{event.done:,}/{event.total:,} {_plural(event.unit, event.total)}"
        self._bar.update(self._bar.task_ids[0], completed=event.done, counts=counts, left=left, text=event.message)
        if event.ended:
            self.close()

    def _write_line(self, event: Progress) -> None:
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._last_line = event.stage, now
        if event.ended or now - self._last_line >= _LINES_GAP:
            print(event, file=sys.stderr, flush=True)
            self._last_line = now
        if event.ended:
            self._stage = ""

    def _open(self, event: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._stage = event.stage
        columns = [TextColumn("{task.fields[stage]}", markup=False), BarColumn(30)]
        columns += [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("counts", "text", "left")]
        # Standard output is not the bar's: it may be a file.
        self._bar = Bars(*columns, console=Console(stderr=True), redirect_stdout=False, refresh_per_second=5)
        self._bar.add_task("", total=event.total, stage=event.stage, counts="", left="", text="")
        self._bar.start()

    def close(self) -> None:
        """Leave the bar in place and start a new line."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
        self._bar = None


def _is_interactive() -> bool:
    """Whether standard error is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


_listener: contextvars.ContextVar[ProgressCallback | None] = contextvars.ContextVar("listener", default=None)
_bars = ProgressBars()


def ignore_progress(event: Progress) -> None:
    """A listener that does nothing."""


@contextlib.contextmanager
def report_to(callback: ProgressCallback | None) -> Iterator[None]:
    """Send the events of this thread to ``callback``; None for no listener."""
    token = _listener.set(callback or ignore_progress)
    try:
        yield
    finally:
        _listener.reset(token)


def report(event: Progress) -> None:
    """Send an event to the listener."""
    (_listener.get() or _bars)(event)


def say(stage: str, message: str = "") -> None:
    """Report that a stage begins or, with ``message``, a message of it."""
    report(Progress(stage, message=message))


class count_steps:  # noqa: N801 (a context manager, read as a verb)
    """Counts the steps of a stage and reports them, about a hundred times in total or every ten seconds."""

    def __init__(self, stage: str, total: int, *, unit: str = "image", done: int = 0, silent: bool = False) -> None:
        """
        Args:
            done: steps done by an earlier run.
            silent: report nothing, because another process does.
        """
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._silent = silent or not total
        self._message = ""
        self._last_time = time.monotonic()
        self._last_done = done
        self._recent_seconds = self._recent_steps = 0.0
        self._ended = False

    def __enter__(self) -> count_steps:
        self._report()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self._report(ended=True)

    def advance(self, steps: int = 1, message: str | None = None) -> None:
        """Count finished steps.

        Args:
            message: message of this and later events; None to keep the last one.
        """
        self.done += steps
        self._message = self._message if message is None else message
        since = time.monotonic() - self._last_time
        enough = 100 * (self.done - self._last_done) >= self.total or since >= _LONGEST_GAP
        if self.done >= self.total or (since >= _SHORTEST_GAP and enough):
            self._report(ended=self.done >= self.total)

    def _report(self, ended: bool = False) -> None:
        if self._silent:
            return
        now = time.monotonic()
        self._weigh(now - self._last_time, self.done - self._last_done)
        self._last_time, self._last_done, self._ended = now, self.done, ended
        known = self._recent_steps > 0 and not ended
        left = (self.total - self.done) * self._recent_seconds / self._recent_steps if known else None
        report(Progress(self.stage, self.done, self.total, self.unit, self._message, left, ended))

    def _weigh(self, seconds: float, steps: int) -> None:
        """Add steps to the recent ones, whose time estimates the rest: the load of a machine changes."""
        decay = math.exp(-seconds / _MEMORY)
        self._recent_seconds = self._recent_seconds * decay + seconds
        self._recent_steps = self._recent_steps * decay + steps
