"""Call functions in fresh processes that start at once.

A run leaves state in its process: handlers of Detectron2's loggers, registries, caches, memory held by allocators. A
new Python for every run would spend seconds on imports, over a hundred times. So a server process
(``multiprocessing``'s fork server) imports the modules once, and each call is a fork of it, which leaves nothing but
its result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reclip_d2.errors import ReclipError, error_line
from reclip_d2.utils.files import check_output_file

_SECONDS_TO_STOP = 20.0


class Processes:
    """Calls each function in a fresh process, and can stop them all. Threads may share one object."""

    def __init__(self, threads: int = 0, preload: Sequence[str] = ()) -> None:
        """
        Args:
            threads: PyTorch's threads in each process; 0 for the default.
            preload: modules that the server imports for all processes; missing ones are skipped.
        """
        self._threads = threads
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        forkserver.ensure_running()
        self._lock = threading.Lock()
        self._alive: set[BaseProcess] = set()
        self._stopped = False

    def call(self, function: Callable[[Any], Any], argument: Any, output: Path) -> Any:
        """``function(argument)`` in a fresh process.

        Args:
            function: a function of an importable module, or of the program itself.
            output: file to which its output is appended.

        Raises:
            ReclipError: the function raised one, ran out of memory, or its process was killed.
            RuntimeError: the function raised something else; the message is its traceback.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        setting = _Setting(output, dict(os.environ), multiprocessing.get_start_method(), self._threads)
        process = self._context.Process(target=_serve, args=(sender, function, argument, setting))
        with receiver:
            with self._lock, sender:  # otherwise this open end would hide the end of the process
                if self._stopped:
                    raise ReclipError("stopped")
                process.start()
                self._alive.add(process)
            try:
                outcome, value = receiver.recv()
            except EOFError:
                outcome, value = "mistake", ""
            process.join()
        with self._lock:
            self._alive.discard(process)
        if outcome == "mistake":
            raise ReclipError(value or _why_it_ended(process.exitcode, output))
        if outcome == "error":
            raise RuntimeError(f"\n{value}")
        return value

    def stop(self) -> None:
        """Stop all processes and start no more: first with SIGTERM, so that they remove temporary files, then with
        SIGKILL.

        The calls end with an error.
        """
        with self._lock:
            self._stopped = True
            processes = list(self._alive)
        for process in processes:  # Ctrl-C in a terminal has reached them by itself; twice does no harm
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        wait_until = time.monotonic() + _SECONDS_TO_STOP
        while processes and time.monotonic() < wait_until:
            wait([process.sentinel for process in processes], timeout=1)
            processes = [process for process in processes if process.is_alive()]
        for process in processes:
            process.kill()


class _Setting(NamedTuple):
    """What a new process does not have of the caller's, or should not have of the server's."""

    output: Path
    environment: dict[str, str]
    start_method: str
    threads: int

    def enter(self) -> None:
        """Make it that of this process."""
        os.environ.clear()
        os.environ.update(self.environment)
        # Or data-loading workers would start from another server, which imports everything again.
        multiprocessing.set_start_method(self.start_method, force=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        check_output_file(self.output, "log")
        with open(self.output, "ab", buffering=0) as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
        if self.threads:
            torch.set_num_threads(self.threads)


def _serve(sender: Connection, function: Callable[[Any], Any], argument: Any, setting: _Setting) -> None:
    """In the new process: call, and send ``(outcome, value)``."""
    # A program that a shell has put in the background ignores interrupts, and so would this: stop() could only kill.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        setting.enter()
        answer = "result", function(argument)
    except KeyboardInterrupt:
        return  # without an answer
    except BaseException as error:
        traceback.print_exc()
        mistake = error_line(error)
        answer = ("error", traceback.format_exc()) if mistake is None else ("mistake", mistake)
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(answer)


def _end_with_parent() -> None:
    """Do not outlive the program: a second one would meet this run at work in its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _why_it_ended(code: int | None, output: Path) -> str:
    if code is not None and code < 0:
        hint = ", perhaps out of memory" if -code == signal.SIGKILL else ""
        return f"its process was killed by signal {-code} ({signal.Signals(-code).name}){hint}: see {output}"
    return f"its process ended with status {code}: see {output}"
