"""Opening files that a user names, and refusing what is not a regular file."""

import os
import socket
import threading

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import (
    MissingFileError,
    check_output_file,
    check_regular,
    display_path,
    format_bytes,
    open_regular,
    open_to_append,
    read_bytes,
    read_text,
)


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    folder = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(folder)


def make_loop(path):
    path.symlink_to(path)


def make_device(path):
    path.symlink_to("/dev/zero")


KINDS = [
    (os.mkdir, "is a folder, not a regular file"),
    (make_pipe, "is a named pipe, not a regular file"),
    (make_socket, "is a socket, not a regular file"),
    (make_device, "is a device, not a regular file"),
    (make_loop, "is a loop of symbolic links"),
]


@pytest.fixture(autouse=True)
def watchdog():
    """A reader that waits would wait for ever: let the test fail, not hang."""
    timer = threading.Timer(20, os._exit, (70,))
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize(("make", "message"), KINDS)
def test_only_regular_files_are_read_and_written(tmp_path, make, message):
    path = tmp_path / "x.txt"
    make(path)
    wanted = f"class file {path} {message}: check --classes"
    for read in (check_regular, open_regular):
        with pytest.raises(ReclipError) as caught:
            read(path, "class file", "check --classes")
        assert str(caught.value) == wanted
    with pytest.raises(ReclipError) as caught:
        read_text(path, "class file", limit=10, remedy="check --classes")
    assert str(caught.value) == wanted
    for write in (check_output_file, open_to_append):
        with pytest.raises(ReclipError) as caught:
            write(path)
        assert str(caught.value) == f"output {path} {message}: name another"


def test_a_file_that_turns_into_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "x"
    make_pipe(path)
    monkeypatch.setattr("reclip_d2.utils.files.check_regular", lambda *_: None)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReclipError, match="named pipe"):
        open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_regular_files_and_links_to_them(tmp_path):
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    link.symlink_to(path)
    assert check_regular(link).st_size == 11
    assert read_bytes(link, limit=11) == b"\xef\xbb\xbfone\r\ntwo"
    assert read_text(str(link), limit=11) == "one\r\ntwo"
    with open_regular(link) as stream:
        assert stream.read(3) == b"\xef\xbb\xbf" and stream.seek(0) == 0
    check_output_file(link)
    check_output_file(tmp_path / "new")
    link.unlink()
    link.symlink_to(tmp_path / "nothing")
    check_output_file(link)


def test_appending(tmp_path):
    for text in ("a", "ü"):
        with open_to_append(tmp_path / "x") as stream:
            stream.write(text)
    assert (tmp_path / "x").read_bytes() == "aü".encode()


def test_what_is_missing_has_an_error_of_its_own(tmp_path):
    with pytest.raises(MissingFileError) as caught:
        read_bytes(tmp_path / "x", "list", limit=1)
    assert str(caught.value) == f"list {tmp_path / 'x'} does not exist: check the path"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(ReclipError, match=r"cannot be read \(.+\): check the path") as caught:
            check_regular(path)
        assert not isinstance(caught.value, MissingFileError)
    for path in ("a\0b", ""):
        with pytest.raises(ReclipError, match="is not a valid path|does not exist"):
            read_bytes(path, limit=1)


def test_the_limit_is_named(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(3072))
    assert len(read_bytes(path, limit=3072)) == 3072
    with pytest.raises(ReclipError) as caught:
        read_bytes(path, "list", limit=2048, remedy="shorten it")
    assert str(caught.value) == f"list {path} has 3 KiB, more than the 2 KiB allowed: shorten it"
    os.truncate(path, 1 << 40)  # a hole, larger than the memory
    with pytest.raises(ReclipError, match="has 1 TiB, more than the 1 MiB allowed"):
        read_text(path, limit=1 << 20)


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs Linux's /proc")
def test_the_limit_holds_for_files_without_a_size():
    assert os.stat("/proc/self/status").st_size == 0
    assert read_bytes("/proc/self/status", limit=1 << 16).startswith(b"Name:")
    with pytest.raises(ReclipError, match="file /proc/self/status has more than the 8 bytes allowed"):
        read_bytes("/proc/self/status", limit=8)


def test_text_is_utf8_and_the_error_names_the_line(tmp_path):
    path = tmp_path / "x"
    for data, message in [
        (b"a\nb\r\nc\rd \xe9", r", line 4: not UTF-8 text: save it as UTF-8"),
        (b"\xff", r", line 1: not UTF-8 text: save it as UTF-8"),
        (b"\xef\xbb\xbf\n\xff", r", line 2: not UTF-8 text: save it as UTF-8"),
        ("é".encode("utf-16"), r" is UTF-16 text: save it as UTF-8"),
        (b"a\nb\0", r", line 2: not text, it contains null bytes: save it as UTF-8 text"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ReclipError) as caught:
            read_text(path, "list", limit=100)
        assert str(caught.value) == f"list {path}{message}"
    path.write_bytes(b"")
    assert read_text(path, limit=0) == ""


def test_paths_are_shown_on_one_line():
    assert display_path("a b/ü.png") == "a b/ü.png"
    assert display_path("a\nb\x1b[2J") == "a\\nb\\x1b[2J"
    assert display_path(os.fsdecode(b"a\xff")) == "a\\udcff"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5 MiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_sizes_are_read_by_people(count, text):
    assert format_bytes(count) == text
