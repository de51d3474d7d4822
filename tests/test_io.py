"""Atomic writing and the cache folder."""

import os
import stat
from pathlib import Path

import pytest

from reclip_d2.io import atomic_write, cache_dir


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


def test_permissions_are_those_of_a_usual_file(tmp_path):
    usual, ours = tmp_path / "usual", tmp_path / "ours"
    usual.write_text("")
    with atomic_write(ours) as temporary:
        temporary.write_text("")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


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
