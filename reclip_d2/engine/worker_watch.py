"""Kill data-loading processes that are stopped, for which training would wait forever.

PyTorch notices killed processes. A stopped process (SIGSTOP, by a job manager or by hand) is alive, and its queue stays
empty without an error.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""How long a process may be stopped. Stopping the whole program (Ctrl-Z) stops this watch, too."""
_INTERVAL = 1.0


class WorkerWatch:
    """Polls this process's data-loading processes, and kills those that stay stopped; PyTorch then raises an error."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """
        Args:
            seconds: how long a process may be stopped.
        """
        self.seconds = seconds
        self._looks: dict[int, int] = {}
        self._interval = min(_INTERVAL, seconds / 4)

    def start(self) -> None:
        """Watch in a daemon thread."""
        threading.Thread(target=self._run, name="worker watch", daemon=True).start()

    def look(self) -> None:
        """Poll once: kill processes that have been stopped in enough consecutive polls.

        Polls are counted, not seconds, since there are none while this program itself is stopped.
        """
        workers = {p.pid: p for p in multiprocessing.active_children() if p.daemon and p.pid is not None}
        self._looks = {pid: self._looks.get(pid, 0) + 1 for pid in workers if is_stopped(pid)}
        for pid, looks in self._looks.items():
            if looks * self._interval >= self.seconds:
                logger.error("data-loading process %d has been stopped for %.0f s: ending it", pid, self.seconds)
                workers[pid].kill()

    def _run(self) -> None:
        while True:
            time.sleep(self._interval)
            self.look()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"  # after the process name, which may contain anything


_started = threading.Event()


def watch_workers() -> None:
    """Start the watch, once per process."""
    if not _started.is_set():
        _started.set()
        WorkerWatch().start()
