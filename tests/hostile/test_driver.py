"""The driver detects what programs do wrong."""

from __future__ import annotations

import textwrap

import pytest

from tests.hostile import driver
from tests.hostile.driver import Case, Server

FAULTS = {
    "traceback": ("raise ValueError('x')", "a traceback"),
    "status": ("print('error: x', file=sys.stderr)", "exit status 0"),
    "two-lines": ("sys.exit('error: x\\nerror: y')", "2 error lines"),
    "no-line": ("sys.exit('x')", "0 error lines"),
    "words": ("sys.exit('error: something')", "the line does not say 'the file'"),
    "overwritten": ("open('precious/letter.txt', 'w'); sys.exit('error: the file')", "changed: precious/letter.txt"),
    "removed": ("os.unlink('photos/0.jpg'); sys.exit('error: the file')", "changed: photos/0.jpg"),
    "new": ("open('x', 'w'); sys.exit('error: the file')", "changed: x"),
    "link": ("os.symlink('a', 'home/x'); sys.exit('error: the file')", "changed: home/x"),
    "mode": ("os.chmod('classes.txt', 0o777); sys.exit('error: the file')", "changed: classes.txt"),
    "canary": ("open('CANARY', 'w'); sys.exit('error: the file')", "code of the input was run"),
    "signal": ("os.kill(os.getpid(), 11)", "killed by signal 11"),
    "hangs": ("import time; time.sleep(60)", "it had not ended"),
    "waits": ("sys.stdin.read(); sys.exit(0)", "exit status 0"),
    "memory": ("x = b'x' * (100 << 20); sys.exit('error: the file')", "MB of memory"),
}  # fmt: skip


@pytest.fixture
def program(tmp_path):
    """A script that does this."""

    def write(text):
        path = tmp_path / "program.py"
        path.write_text(f"import os, sys\n{textwrap.dedent(text)}\n")
        return str(path)

    return write


@pytest.mark.parametrize(("text", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_are_seen(server: Server, finished, tmp_path, program, monkeypatch, text, words):
    if words == "it had not ended":
        monkeypatch.setattr(driver, "_SECONDS", 0.5)
    if "memory" in words:
        monkeypatch.setattr(driver, "_MEGABYTES", 80)
    case = Case("fault", program(text), (), words="the file")
    found = server.run(case, tmp_path / "case", finished).problems(case)
    assert any(words in problem for problem in found), found


def test_right_ends(server, finished, tmp_path, program):
    wrong = Case("wrong", program("open('out', 'w').write('x'); sys.exit('error: the file')"), (), words="the file")
    assert server.run(wrong, tmp_path / "wrong", finished).problems(wrong) == []
    usage = Case("usage", program("import argparse; argparse.ArgumentParser().parse_args(['x'])"), ())
    ending = server.run(usage, tmp_path / "usage", finished)
    assert ending.problems(usage) == [] and ending.status == 2
    fine = Case("fine", program("print(os.getcwd(), *sys.argv[1:])"), ("{case}/x",), fine=True)
    ending = server.run(fine, tmp_path / "fine", finished)
    assert ending.problems(fine) == [] and ending.out.split() == [str(tmp_path / "fine"), str(tmp_path / "fine" / "x")]
