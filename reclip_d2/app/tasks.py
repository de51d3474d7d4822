"""Requests that run side by side: each computes in short turns, and ends soon after it is told to."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

from reclip_d2.errors import ReclipError

_POLL = 0.1  # seconds until a waiting task looks whether it was stopped


class TaskStopped(ReclipError):
    """The visitor has pressed Stop, or left."""


class TaskSuperseded(TaskStopped):
    """The same visitor has asked for something else in the meantime."""


class Turns:
    """A lock that is granted in the order in which it is asked for: who asks often cannot keep others out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextlib.contextmanager
    def take(self, task: Task) -> Iterator[None]:
        """Wait for the turn of a task, and hold it for the length of the block.

        Raises:
            TaskStopped: the task was stopped before its turn came.
        """
        ticket = threading.Event()
        with self._lock:
            self._queue.append(ticket)
            self._queue[0].set()
        try:
            while not ticket.wait(_POLL):
                task.check()
            task.check()
            yield
        finally:
            with self._lock:
                self._queue.remove(ticket)
                if self._queue:
                    self._queue[0].set()


class Task:
    """One request of a visitor."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._reason: type[TaskStopped] | None = None

    def stop(self, reason: type[TaskStopped] = TaskStopped) -> None:
        """Make :meth:`check` raise, from another thread; the first reason counts."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raise :class:`TaskStopped` if the task was stopped; to be called between steps of work."""
        if self._reason is not None:
            raise self._reason("stopped")

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """The right to use the networks, for one short step."""
        return self._turns.take(self)


class Visitors:
    """Who uses the page, and the request of each that is under way: a newer one of the same visitor ends it."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}

    @contextlib.contextmanager
    def task(self, visitor: str | None = None) -> Iterator[Task]:
        """A request of a visitor, or of nobody in particular."""
        task = Task(self._turns)
        if visitor is None:
            yield task
            return
        with self._lock:
            before, self._tasks[visitor] = self._tasks.get(visitor), task
        if before is not None:
            before.stop(TaskSuperseded)
        try:
            yield task
        finally:
            with self._lock:
                if self._tasks.get(visitor) is task:
                    del self._tasks[visitor]

    def stop(self, visitor: str) -> bool:
        """Stop the request of a visitor; returns whether there is one."""
        with self._lock:
            task = self._tasks.get(visitor)
        if task is not None:
            task.stop()
        return task is not None

    def stop_all(self) -> None:
        """Stop everyone's request."""
        with self._lock:
            tasks = list(self._tasks.values())
        for task in tasks:
            task.stop()
