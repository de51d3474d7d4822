"""Atomic writing and the cache folder."""

import os
import secrets
import stat
from pathlib import Path

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write, cache_dir, remove_leftovers


def test_writes_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary != path and temporary.suffix == ".txt"
        temporary.write_text("content")
        assert not path.exists()
    assert path.read_text() == "content"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(str(path)) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_only_regular_files_are_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link, tmp_path):
        with pytest.raises(ReclipError, match=f"output {path} is a .*, not a regular file"), atomic_write(path):
            pytest.fail("the block was entered")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_permissions_are_those_of_a_usual_file(tmp_path):
    usual, ours = tmp_path / "usual", tmp_path / "ours"
    usual.write_text("")
    with atomic_write(ours) as temporary:
        temporary.write_text("")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_the_umask_is_left_alone(tmp_path, monkeypatch):
    """Even for a moment: it is the whole process's, and another thread may make a file then."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail(f"umask({mask})"))
            with atomic_write(tmp_path / "file") as temporary:
                temporary.write_text("")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_temporary_name_that_is_taken(tmp_path, monkeypatch):
    names = iter(["aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    (tmp_path / ".file.aaaaaaaa.tmp").write_text("another's")
    with atomic_write(tmp_path / "file") as temporary:
        assert temporary.name == ".file.bbbbbbbb.tmp"
    assert (tmp_path / ".file.aaaaaaaa.tmp").read_text() == "another's"


@pytest.mark.parametrize("letter", ["a", "é", "雲", "🌲"])
def test_names_as_long_as_names_can_be(tmp_path, letter):
    """255 bytes; letters of several bytes are not split, and what a kill leaves is known for a leftover."""
    stem = "x" + letter * (250 // len(letter.encode()))
    path = tmp_path / (stem + "y" * (251 - len(stem.encode())) + ".png")
    assert len(os.fsencode(path.name)) == 255
    with atomic_write(path) as temporary:
        temporary.write_text("content")
        assert temporary.name.startswith(f".x{letter}") and temporary.suffix == ".png"
        left = temporary.name
    assert path.read_text() == "content" and os.listdir(tmp_path) == [path.name]
    (tmp_path / left).touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [path.name]


def test_replaces_a_file(tmp_path):
    path = tmp_path / "file"
    for content in ("one", "two"):
        with atomic_write(path) as temporary:
            temporary.write_text(content)
    assert path.read_text() == "two"


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("RECLIP_CACHE", "/somewhere/cache")
    assert cache_dir() == Path("/somewhere/cache")
    monkeypatch.setenv("RECLIP_CACHE", "~/cache")
    assert cache_dir() == Path.home() / "cache"
    monkeypatch.delenv("RECLIP_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "reclip_d2"
