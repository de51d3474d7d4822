"""Ctrl-C while several processes make labels: one line for all of them."""

import os
import signal
import sys
import time
from pathlib import Path

from reclip_d2.data.datasets import preparation
from reclip_d2.errors import exit_on_error


def begin(chunk: list, folder: str) -> None:
    """Leave a file that says that the work has begun, and take a moment."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(0.5)


def test_ctrl_c_in_several_processes(tmp_path):
    begun, log = tmp_path / "begun", tmp_path / "log"
    begun.mkdir()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)  # as a program of a terminal: the signal reaches its workers, too
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            exit_on_error(lambda: list(preparation._in_processes(begin, [[1]] * 40, 3, str(begun))))()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
        os._exit(9)
    limit = time.monotonic() + 30
    while len(list(begun.iterdir())) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert log.read_text() == "\ninterrupted\n"
