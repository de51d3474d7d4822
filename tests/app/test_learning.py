"""The process that learns: its progress, its errors, its end."""

import os
import signal
import sys
import threading
import time

import pytest

from reclip_d2.app.learning import Learning, LearningStopped
from reclip_d2.errors import ReclipError


def learning(program):
    """A process of this program in the place of the command."""
    made = Learning([])
    made.command = [sys.executable, "-c", program]
    return made


def test_the_command():
    assert Learning(["photos", "--fast"]).command == [sys.executable, "-m", "reclip_d2", "segment", "photos", "--fast"]


def test_progress():
    program = r"""
import sys
from tqdm import tqdm
print("images    3"); print("timing a first batch of each step ...", flush=True)
for _ in tqdm(range(3), desc="hypotheses (crops)", unit="image", mininterval=0): pass
print("rectification ...", flush=True)
for _ in tqdm(range(40), desc="training", mininterval=0): pass
"""
    reports = []
    learning(program).run(lambda *report: reports.append(report))
    # Those that come at once are one: what is sure is the last of all, and that none is made up.
    assert reports[-1] == ("training", 40, 40)
    steps = {("timing a first batch of each step", 0), ("hypotheses", 3), ("rectification", 0), ("training", 40)}
    assert {(name, total) for name, _, total in reports} <= steps
    assert all(0 <= done <= total for _, done, total in reports)


def test_progress_is_told_each_half_second():
    """Importing the command asks tqdm for a line every 30 s where nobody watches; here somebody does."""
    program = """
import sys
import reclip_d2.cli
from tqdm import tqdm
with tqdm(total=1) as bar: interval = bar.mininterval
sys.exit(f"error: {interval} s")
"""
    with pytest.raises(ReclipError, match=r"^0\.5 s$"):
        learning(program).run(lambda *_: None)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; print('x ...', flush=True); sys.exit('error: photo.jpg is bad: replace it')",
         "photo.jpg is bad: replace it"),
        ("import os; os.kill(os.getpid(), 9)", "for want of memory"),
        ("raise ValueError('a bug')", "status 1 .ValueError: a bug."),
    ],
)  # fmt: skip
def test_errors(program, words):
    with pytest.raises(ReclipError, match=words):
        learning(program).run(lambda *_: None)


def test_stop(tmp_path):
    """It ends with the processes that it has started."""
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
print("rectification ...", flush=True)
time.sleep(600)
"""
    begun, made = threading.Event(), learning(program)
    stopper = threading.Thread(target=lambda: begun.wait(60) and made.stop())
    stopper.start()
    with pytest.raises(LearningStopped):
        made.run(lambda *_: begun.set())
    stopper.join()
    child = int((tmp_path / "child").read_text())
    assert _ends(child)


def _ends(pid):
    """Whether a process ends within seconds; one that nobody waits for may stay as a zombie."""
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
    made = learning("raise SystemExit(3)")
    made.stop()
    with pytest.raises(LearningStopped):
        made.run(lambda *_: None)
