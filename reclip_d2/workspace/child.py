"""A run in a child process, for programs that must be able to stop it at any time, or to survive its crash.

The child is ``python -m reclip_d2.workspace.child``. It reads its job as JSON from standard input, and writes one JSON
object per line to standard output: ``{"progress": {...}}`` for each event, and finally ``{"error": "..."}`` or
``{"done": true}``. Output of libraries goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from reclip_d2.errors import ReclipError, error_line
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.progress import Progress, ProgressCallback
from reclip_d2.workspace.options import SegmentOptions, in_options

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_PATIENCE = 10  # seconds from terminate to kill


class RunStopped(ReclipError):
    """:meth:`SegmentProcess.stop` was called."""


class SegmentProcess:
    """:func:`reclip_d2.workspace.segment.segment` in a child process.

    A stopped run can be resumed in its output folder.
    """

    def __init__(
        self, images: Sequence[StrPath], classes: StrPath, output: StrPath, options: SegmentOptions | None = None
    ) -> None:
        """
        Args:
            images, output, options: see :func:`~reclip_d2.workspace.segment.segment`.
            classes: a class file.
        """
        self.command = [sys.executable, "-m", "reclip_d2.workspace.child"]
        self.job = {
            "images": [os.fspath(path) for path in images],
            "classes": os.fspath(classes),
            "output": os.fspath(output),
            "options": dataclasses.asdict(options or SegmentOptions()),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self, progress: ProgressCallback) -> None:
        """Run the job to the end.

        Args:
            progress: called with each event, in this thread.

        Raises:
            RunStopped: :meth:`stop` was called, perhaps before.
            ReclipError: the run failed; the message is its error line.
        """
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        with tempfile.TemporaryFile() as said:
            with self._lock:
                if self._stopped.is_set():
                    raise RunStopped("stopped")
                # In a new session, so that its data-loading processes can be stopped with it.
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                    env=environment, start_new_session=True,
                )  # fmt: skip
            process = self._process
            try:
                with (
                    contextlib.suppress(BrokenPipeError),
                    process.stdin,
                ):  # a dead child's error is reported below
                    process.stdin.write(json.dumps(self.job).encode())
                error = _follow(process.stdout, progress)
                status = process.wait()
            finally:
                _end(process)
                process.stdout.close()
            if self._stopped.is_set():
                raise RunStopped("stopped")
            if error or status:
                raise ReclipError(error or _cause(status, said))

    def stop(self) -> None:
        """Stop the run from another thread; :meth:`run` then raises."""
        with self._lock:
            self._stopped.set()
            if self._process is not None:
                _end(self._process)


def _follow(stream: IO[bytes], progress: ProgressCallback) -> str:
    """Forward the child's events until it closes the stream; returns its error line, or ""."""
    for line in stream:
        message = json.loads(line)
        if "progress" in message:
            progress(Progress(**message["progress"]))
        elif "error" in message:
            return message["error"]
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _cause(status: int, said: IO[bytes]) -> str:
    """Error line for a child that exited without reporting one."""
    if status == -signal.SIGKILL:
        return "the training was killed, most likely out of memory: use a smaller CLIP, or a GPU"
    said.seek(0)
    lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"the training ended with status {status} ({last})"


def main() -> None:
    """The child."""
    # Only events go to standard output; if it is closed, the next one ends the run.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        job = json.load(sys.stdin)
        from reclip_d2.workspace.segment import segment  # takes seconds

        options = {key: tuple(value) if isinstance(value, list) else value for key, value in job["options"].items()}
        segment(
            job["images"],
            job["classes"],
            job["output"],
            SegmentOptions(**options),
            progress=lambda event: send({"progress": dataclasses.asdict(event)}),
        )
        send({"done": True})
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        send({"error": in_options(line)})
        sys.exit(1)


if __name__ == "__main__":
    main()
