"""Concurrent requests: each computes in short turns and can be stopped between them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

from reclip_d2.errors import ReclipError

_POLL = 0.1  # seconds between checks of whether a waiting task was stopped


class TaskStopped(ReclipError):
    """The visitor pressed Stop or left."""


class TaskSuperseded(TaskStopped):
    """The same visitor made another request."""


class Turns:
    """A fair lock: granted in the order of requests, so that no one can starve others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextlib.contextmanager
    def take(self, task: Task) -> Iterator[None]:
        """Wait for a task's turn, and hold it during the block.

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
        """Make :meth:`check` raise. Can be called from another thread; the first reason wins."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raise :class:`TaskStopped` if the task was stopped. Call it between steps of work."""
        if self._reason is not None:
            raise self._reason("stopped")

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Exclusive use of the networks, for one short step."""
        return self._turns.take(self)


class Visitors:
    """Visitors of the page, and each one's current request. A new request stops the visitor's previous one."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}

    @contextlib.contextmanager
    def task(self, visitor: str | None = None) -> Iterator[Task]:
        """A request of a visitor, or of none in particular."""
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
        """Stop a visitor's request; returns whether there was one."""
        with self._lock:
            task = self._tasks.get(visitor)
        if task is not None:
            task.stop()
        return task is not None

    def stop_all(self) -> None:
        """Stop all requests."""
        with self._lock:
            tasks = list(self._tasks.values())
        for task in tasks:
            task.stop()
