"""Functions in separate processes: results, errors, termination, and no leftovers."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from reclip_d2.errors import ReclipError
from reclip_d2.experiments.process import Processes

# ---- what the processes do: they import this module -----------------------------------------------------------------


def add_one(value):
    print("adding to", value)
    print("a word of warning", file=sys.stderr)
    return value + 1


def leave_things_behind(value):
    logger = logging.getLogger("detectron2")
    logger.addHandler(logging.NullHandler())
    torch.set_num_threads(1)
    return len(logger.handlers), os.getpid(), os.environ["RECLIP_TEST"], multiprocessing.get_start_method()


def mistake(value):
    raise ReclipError(f"{value} is wrong: mend it")


def bug(value):
    raise KeyError(value)


def die(value):
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(value):
    raise MemoryError


def threads(value):
    return torch.get_num_threads()


def sleep(folder):
    (folder / "temporary").write_text("half")
    (folder / "begun").write_text("")
    try:
        time.sleep(60)
    finally:
        (folder / "temporary").unlink()


# ---- tests -----------------------------------------------------------------------------------------------------


def test_the_answer_and_what_was_printed(tmp_path):
    processes, output = Processes(), tmp_path / "run" / "output.txt"
    assert processes.call(add_one, 1, output) == 2
    assert processes.call(add_one, 5, output) == 6
    lines = output.read_text().splitlines()
    assert sorted(lines) == ["a word of warning"] * 2 + ["adding to 1", "adding to 5"]


def test_nothing_is_left_for_the_next(tmp_path, monkeypatch):
    processes = Processes()
    results = []
    for value in ("first", "second"):
        monkeypatch.setenv("RECLIP_TEST", value)
        results.append(processes.call(leave_things_behind, None, tmp_path / "output.txt"))
    (handlers, pid, environment, method), (handlers_2, pid_2, environment_2, method_2) = results
    assert handlers == handlers_2 and pid != pid_2 and os.getpid() not in (pid, pid_2)
    assert (environment, environment_2) == ("first", "second")
    assert method == method_2 == multiprocessing.get_start_method()


def test_errors(tmp_path):
    processes, output = Processes(), tmp_path / "output.txt"
    with pytest.raises(ReclipError, match="^7 is wrong: mend it$"):
        processes.call(mistake, 7, output)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*in bug.*KeyError: 'x'"):
        processes.call(bug, "x", output)
    with pytest.raises(ReclipError, match=r"killed by signal 9 \(SIGKILL\), perhaps out of memory: see .*output"):
        processes.call(die, None, output)
    with pytest.raises(ReclipError, match="out of CPU memory"):
        processes.call(out_of_memory, None, output)
    assert "KeyError: 'x'" in output.read_text()
    assert processes.call(add_one, 1, output) == 2


def test_threads(tmp_path):
    assert Processes(threads=3).call(threads, None, tmp_path / "output.txt") == 3


def test_stop_ends_all_calls_cleanly(tmp_path):
    processes, errors = Processes(), []

    def call(folder):
        folder.mkdir()
        try:
            processes.call(sleep, folder, folder / "output.txt")
        except ReclipError as error:
            errors.append(error)

    folders = [tmp_path / name for name in "ab"]
    callers = [threading.Thread(target=call, args=(folder,)) for folder in folders]
    for caller in callers:
        caller.start()
    deadline = time.monotonic() + 60
    while not all((folder / "begun").exists() for folder in folders):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    start = time.monotonic()
    processes.stop()
    for caller in callers:
        caller.join(30)
    assert time.monotonic() - start < 10 and len(errors) == 2
    assert not any((folder / "temporary").exists() for folder in folders)
    with pytest.raises(ReclipError, match="stopped"):
        processes.call(add_one, 1, tmp_path / "output.txt")
