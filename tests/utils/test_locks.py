"""Locks: one holder, among processes and within one; they end with their process."""

import errno
import os
import signal
import subprocess
import sys

import filelock
import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.locks import exclusive, lock_path, try_lock, waiting

HOLD = """
import sys, time
from reclip_d2.utils.locks import try_lock
lock = try_lock(sys.argv[1])
print("held" if lock else "busy", flush=True)
time.sleep(60)
"""


def holder(path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_holder(tmp_path):
    path = lock_path(tmp_path / "new" / "h.jsonl")
    assert path.name == ".h.jsonl.lock"
    first = try_lock(path)
    assert try_lock(path) is None
    assert try_lock(path, seconds=0.1) is None
    first.release()
    second = try_lock(path)
    assert second is not None
    second.release()


def test_a_killed_process_holds_nothing(tmp_path):
    process = holder(tmp_path / ".lock")
    try:
        with pytest.raises(ReclipError, match="^busy: wait$"), exclusive(tmp_path / ".lock", "busy: wait"):
            pytest.fail("two holders")
        os.kill(process.pid, signal.SIGKILL)
        with waiting(tmp_path / ".lock", "the other"):
            assert try_lock(tmp_path / ".lock") is None
    finally:
        process.kill()
        process.communicate()
    with exclusive(tmp_path / ".lock", "busy: wait"):
        pass


def failing(number: int):
    def acquire(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "x/.lock")

    return acquire


def test_file_systems_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(filelock.FileLock, "acquire", failing(errno.ENOLCK))
    with exclusive(tmp_path / ".lock", "busy"):
        assert "no locks on the file system" in caplog.text
    monkeypatch.setattr(filelock.FileLock, "acquire", failing(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        try_lock(tmp_path / ".lock")


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        try_lock(tmp_path / ".lock")
    assert not (tmp_path / "elsewhere").exists()
