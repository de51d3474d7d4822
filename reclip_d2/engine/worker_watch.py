"""End data-loading processes that are stopped: the training would wait for them for ever.

A process that is killed is noticed by PyTorch. One that is stopped (SIGSTOP, by a job manager or by hand) is alive, and
its queue stays empty without an error.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""How long a process may be stopped: whoever stops the whole program (Ctrl-Z) stops this watch, too."""
_INTERVAL = 1.0


class WorkerWatch:
    """Looks at this process's data-loading processes, and kills those that stay stopped; PyTorch then says so."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """
        Args:
            seconds: how long a process may be stopped.
        """
        self.seconds = seconds
        self._looks: dict[int, int] = {}
        self._interval = min(_INTERVAL, seconds / 4)

    def start(self) -> None:
        """Watch in a thread of its own, which ends with the program."""
        threading.Thread(target=self._run, name="worker watch", daemon=True).start()

    def look(self) -> None:
        """Count each process that is stopped now; kill it when it has been so at all looks for long enough.

        Looks are counted, not seconds: while this program is stopped itself, there are none.
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
    """Whether a process is stopped by a signal; False where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"  # behind the name, which may hold anything


_started = threading.Event()


def watch_workers() -> None:
    """Watch from now on; once a process."""
    if not _started.is_set():
        _started.set()
        WorkerWatch().start()
