"""Digests of files: the whole content counts, and each file is read once."""

import hashlib
import os
import sqlite3
import threading

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils import digest
from reclip_d2.utils.digest import check_digest, current_digest, file_digest, file_digests
from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]


@pytest.fixture(autouse=True)
def cache(isolated_cache, monkeypatch):
    digest._remove_damaged.cache_clear()
    return isolated_cache


@pytest.fixture
def settled(monkeypatch):
    """Files count as old at once."""
    monkeypatch.setattr(digest, "_SETTLED", -60.0)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    open_regular = digest.open_regular

    def opening(path: object, *args: object) -> object:
        names.append(os.path.basename(path))
        return open_regular(path, *args)

    monkeypatch.setattr(digest, "open_regular", opening)
    return names


def test_every_byte_counts(tmp_path):
    content = bytearray(3_000_001)  # more than one chunk
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    assert file_digest(path) == hashlib.sha256(content).hexdigest()
    content[1_500_000] = 1  # in the middle; the size stays
    path.write_bytes(content)
    assert file_digest(path) == hashlib.sha256(content).hexdigest()


def test_what_is_no_readable_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    paths = [tmp_path / "pipe", tmp_path / "none", tmp_path, "/dev/zero", "a\0b", tmp_path / "empty"]
    assert file_digests(paths) == ["", "", "", "", "", hashlib.sha256().hexdigest()]


def test_a_file_is_read_once(tmp_path, settled, reads):
    for name in "ab":
        (tmp_path / name).write_text(name)
    first = file_digests([tmp_path / "a", tmp_path / "b"])
    assert sorted(reads) == ["a", "b"]
    assert file_digests([tmp_path / "b", tmp_path / "a"]) == first[::-1]
    assert len(reads) == 2


@pytest.mark.parametrize("change", ["rewritten", "replaced"])
def test_a_change_that_keeps_size_and_time_is_seen(tmp_path, settled, change):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("old")
    first = file_digest(path)
    times = path.stat()
    target = path if change == "rewritten" else other
    target.write_text("new")
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(target, path)
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert file_digest(path) == hashlib.sha256(b"new").hexdigest() != first


def test_a_fresh_file_is_not_kept(tmp_path, reads):
    (tmp_path / "a").write_text("a")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "a")
    assert reads == ["a", "a"]  # it might change again within the resolution of the file system's clock


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, settled, monkeypatch, reads):
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    keys = iter(range(100))
    monkeypatch.setattr(digest, "_status_key", lambda path, status: str(next(keys)))
    file_digest(path)
    file_digest(path)
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["garbage", "folder", "wrong value"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, settled, reads, damage):
    database = cache / "digests.sqlite"
    (tmp_path / "a").write_text("a")
    if damage == "garbage":
        database.write_bytes(b"no database" * 1000)
    elif damage == "folder":
        database.mkdir()
    else:
        file_digest(tmp_path / "a")
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE digests SET digest = 'short'")
    for _ in range(2):
        assert file_digest(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()
    if damage == "garbage":
        file_digest(tmp_path / "a")
        assert len(reads) < 3  # it is used again


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RECLIP_CACHE", str(tmp_path / "file"))
    assert file_digest(tmp_path / "file") == hashlib.sha256().hexdigest()


def test_the_cache_is_bounded(tmp_path, cache, settled, monkeypatch, reads):
    monkeypatch.setattr(digest, "_MAX_ROWS", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        file_digest(tmp_path / name)
    with sqlite3.connect(cache / "digests.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM digests").fetchone() == (2,)
    file_digest(tmp_path / "c")
    assert len(reads) == 3


def test_threads_at_once(tmp_path, settled):
    paths = [tmp_path / str(i) for i in range(40)]
    for path in paths:
        path.write_text(path.name)
    wanted = [hashlib.sha256(path.name.encode()).hexdigest() for path in paths]
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(file_digests(paths))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 8


def test_signatures_of_earlier_versions(tmp_path):
    """Size, and 16 digits of a hash of the first and the last 64 KiB: for small files both are the whole content."""
    path = tmp_path / "a.bin"
    content = bytes(range(256)) * 1000
    path.write_bytes(content)
    legacy = f"256000-{hashlib.sha256(content[:65536] + content[-65536:]).hexdigest()[:16]}"
    assert current_digest(legacy, path) == file_digest(path)
    path.write_bytes(content[:-1] + b"x")
    assert current_digest(legacy, path) == legacy  # another file: it stays, and differs from all digests
    assert current_digest(legacy, tmp_path / "none") == legacy
    for recorded in ("", "openai", "x-y", file_digest(path)):
        assert current_digest(recorded, path) == recorded


def test_a_published_hash(tmp_path):
    path = tmp_path / "resnet-1234abcd.pth"
    path.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()[:8]
    check_digest(path, right, "WEIGHTS torchvision://resnet")
    with pytest.raises(ReclipError, match=rf"WEIGHTS torchvision://resnet: .* begins with {right} instead of 1234abcd"):
        check_digest(path, "1234abcd", "WEIGHTS torchvision://resnet")
    with pytest.raises(ReclipError, match="begins with nothing instead"):
        check_digest(tmp_path / "none", "1234abcd", "file")
