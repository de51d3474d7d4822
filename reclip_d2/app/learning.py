"""Learning the bias: the command ``reclip segment`` in a process of its own, which can be stopped at any time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from reclip_d2.app.tasks import TaskStopped
from reclip_d2.errors import ReclipError

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 if that is not known)."""

# A progress bar: `training:  35%|███▌      | 70/200 [00:03<00:06, ...`
_BAR = re.compile(r"(\w+)[^:|]*:\s+\d+%\|[^|]*\|\s*(\d+)/(\d+)")
# A step begins: `rectification ...`
_STEP = re.compile(r"(\w[\w ]*) \.\.\.$")
_ERROR = "error: "
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_BAR_INTERVAL = "0.5"  # seconds between two lines of a progress bar
_PATIENCE = 10  # seconds from the request to end to the end by force


class LearningStopped(TaskStopped):
    """The visitor has stopped it."""


class Learning:
    """One run of ``reclip segment``.

    It goes with the arguments of that command alone, so what is learnt here is what is learnt there.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """
        Args:
            arguments: of ``reclip segment``.
        """
        self.command = [sys.executable, "-m", "reclip_d2", "segment", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self, report: Report) -> None:
        """Run it to the end.

        Raises:
            LearningStopped: :meth:`stop` was called.
            ReclipError: the command has ended with an error, whose line this is.
        """
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TQDM_")}
        paths = [str(_PACKAGE_PARENT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8:backslashreplace"}
        environment["TQDM_MININTERVAL"] = _BAR_INTERVAL  # without it the command, into a pipe, sends a line every 30 s
        with self._lock:
            if self._stopped.is_set():
                raise LearningStopped("stopped")
            # In a session of its own, so that it ends with its data-loading processes when it is told to.
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        try:
            last = self._follow(report)
            status = self._process.wait()
        finally:
            self._end(self._process)
        if self._stopped.is_set():
            raise LearningStopped("stopped")
        if status:
            raise ReclipError(_cause(status, last))

    def _follow(self, report: Report) -> str:
        """Read what the command says to its end, and report its progress; returns the error's line, or the last."""
        last, rest = "", b""
        while chunk := os.read(self._process.stdout.fileno(), 1 << 14):
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            news: tuple[str, int, int] | None = None
            for line in lines:
                text = line.decode("utf-8", errors="replace").strip()
                if bar := _BAR.match(text):
                    news = (bar[1], int(bar[2]), int(bar[3]))
                elif step := _STEP.match(text):
                    news = (step[1], 0, 0)
                elif text and not last.startswith(_ERROR):
                    last = text
            if news is not None:  # of several that came at once the last
                report(*news)
        return last

    def stop(self) -> None:
        """End it, from another thread; :meth:`run` raises there."""
        with self._lock:
            self._stopped.set()
            if self._process is not None:
                self._end(self._process)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """End a process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _cause(status: int, last: str) -> str:
    if last.startswith(_ERROR):
        return last.removeprefix(_ERROR)
    if status == -signal.SIGKILL:
        return "the training was killed, most likely for want of memory: use a smaller CLIP, or a GPU"
    return f"the training ended with status {status} ({last or 'it said nothing'})"
