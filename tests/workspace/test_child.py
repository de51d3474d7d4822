"""A run in a child process: events, errors, termination."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.progress import Progress
from reclip_d2.workspace.child import RunStopped, SegmentProcess
from reclip_d2.workspace.options import SegmentOptions
from tests.cli.conftest import FAST_KEYS, write_inputs


def process(program):
    """A process of this program in place of the run."""
    made = SegmentProcess(["photos"], "classes.txt", "out")
    made.command = [sys.executable, "-c", program]
    return made


def test_a_run_and_its_mistake(tmp_path):
    """The real child: a whole run with its events, then one whose input is wrong."""
    write_inputs(tmp_path)
    options = SegmentOptions(fast=True, clip="reclip-embedded", device="cpu", opts=FAST_KEYS)
    events = []
    SegmentProcess([tmp_path / "photos"], tmp_path / "classes.txt", tmp_path / "out", options).run(events.append)
    assert all(type(event) is Progress for event in events)
    assert [event for event in events if event.ended] == [Progress("masks", 6, 6, ended=True)]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["masks"] == 6

    options = SegmentOptions(clip="reclip-embedded", device="cpu", opts=("SOLVER.MAX_ITER", "-3"))
    wrong = SegmentProcess([tmp_path / "photos"], tmp_path / "classes.txt", tmp_path / "other", options)
    with pytest.raises(ReclipError, match="--iterations"):  # the user knows options, not keys
        wrong.run(events.append)
    assert not (tmp_path / "other").exists()


def test_what_the_child_prints_is_no_event():
    program = r"""
import json, sys
job = json.load(sys.stdin)
assert job["images"] == ["photos"] and job["classes"] == "classes.txt" and job["output"] == "out", job
print("a library prints", file=sys.stderr)
print(json.dumps({"progress": {"stage": "masks", "done": 1, "total": 3}}), flush=True)
print(json.dumps({"done": True}))
"""
    events = []
    process(program).run(events.append)
    assert events == [Progress("masks", 1, 3)]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("""print('{"progress": {"stage": "x"}}'); print('{"error": "photo.jpg is bad: replace it"}'); exit(1)""",
         "^photo.jpg is bad: replace it$"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory"),
        ("raise ValueError('a bug')", "status 1 .ValueError: a bug."),
        ("raise SystemExit(3)", "status 3 .no output."),
    ],
)  # fmt: skip
def test_mistakes_and_bugs(program, words):
    with pytest.raises(ReclipError, match=words):
        process(program).run(lambda event: None)


def test_stop(tmp_path):
    """It ends with the processes that it has started."""
    program = f"""
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
print(json.dumps({{"progress": {{"stage": "rectification"}}}}), flush=True)
time.sleep(600)
"""
    begun, made = threading.Event(), process(program)
    stopper = threading.Thread(target=lambda: begun.wait(60) and made.stop())
    stopper.start()
    with pytest.raises(RunStopped):
        made.run(lambda event: begun.set())
    stopper.join()
    child = int((tmp_path / "child").read_text())
    assert _ends(child)


def test_a_listener_that_fails_ends_the_run(tmp_path):
    program = f"""
import os, time
open({str(tmp_path / "child")!r}, "w").write(str(os.getpid()))
print('{{"progress": {{"stage": "masks"}}}}', flush=True)
time.sleep(600)
"""

    def fail(event):
        raise KeyError("a bug of the listener's")

    with pytest.raises(KeyError):
        process(program).run(fail)
    assert _ends(int((tmp_path / "child").read_text()))


def _ends(pid):
    """Whether a process ends within seconds; it may remain as a zombie if nobody waits for it."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_stopped_before_it_began():
    made = process("raise SystemExit(3)")
    made.stop()
    with pytest.raises(RunStopped):
        made.run(lambda event: None)
