"""Output paths: one line for invalid ones, and the check leaves no files."""

import errno
import os
from pathlib import Path

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.output_paths import check_output_folder, check_output_path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    yield
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["dangling", "file", "folder", "loop", "pipe"]


def message_of(check, path) -> str:
    with pytest.raises(ReclipError) as caught:
        check(path, "--output")
    message = str(caught.value)
    assert message.startswith("--output") and message.isprintable() and len(message) < 600
    return message


BAD = [
    ("", "is empty"),
    ("  ", "is empty"),
    ("s3://bucket/x", "is a URL"),
    ("s3:/bucket/x", "is a URL"),  # what pathlib makes of it
    ("https://host/x", "is a URL"),
    ("file:///tmp/x", "is a URL"),
    ("file/x", "is a file"),
    ("dangling/x", "is not a folder"),
    ("loop/x", "is not a folder"),
    ("pipe/x", "is not a folder"),
    ("/dev/null/x", "is not a folder"),
    ("/proc/x", "cannot write to /proc"),
    ("/proc/x/y/z", "cannot write to /proc"),
    ("/sys/x", "cannot write to /sys"),
    ("x" * 256, "too long"),
    ("é" * 128, "too long"),
    ("a/" * 3000 + "b", "too long"),
    ("a\0b", "control characters"),
    ("a\nb", "control characters"),
    ("\udcff", "not UTF-8"),
    ("~nobody-of-this-name/x", "is in the home of an unknown user"),
]


@pytest.mark.parametrize(("path", "expected"), BAD)
@pytest.mark.parametrize("check", [check_output_folder, check_output_path])
def test_paths_that_cannot_be_made(check, path, expected):
    assert expected in message_of(check, path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("file", "is a file"),
        ("dangling", "is not a folder"),
        ("pipe", "is not a folder"),
        ("/dev/null", "is not a folder"),
    ],
)
def test_no_folder(path, expected):
    assert expected in message_of(check_output_folder, path)


@pytest.mark.parametrize("path", ["folder", "folder/", "new/", "/", "..", "pipe", "/dev/null"])
def test_no_file(path):
    assert message_of(check_output_path, path)


def test_what_can_be_made(tmp_path):
    for path in ("new", "new/deeper/x", "folder", "folder/x", ".", "x" * 255, "hä us/名", tmp_path / "a" / "b"):
        assert check_output_folder(path) == Path(path)
    for path in ("new.pth", "new/x.pth", "file", "folder/x", "dangling"):
        assert check_output_path(path) == Path(path)
    assert check_output_folder("~/runs") == tmp_path / "home" / "runs"


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_refuses(monkeypatch, reason):
    """Root may write anywhere, so the refusal is made."""

    def refuse(**arguments):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    for check in (check_output_folder, check_output_path):
        assert os.strerror(reason) in message_of(check, "folder/x")
