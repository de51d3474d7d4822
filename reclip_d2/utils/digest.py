"""Identify files by their content: SHA-256 of the whole file, computed once.

Digests are cached in an SQLite file of the cache folder, keyed by the file's path, device, inode, size, mtime and
ctime. A file that is edited, replaced or restored to an old modification time is read again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, open_regular
from reclip_d2.utils.io import cache_dir
from reclip_d2.utils.pages import split_page
from reclip_d2.utils.progress import count_steps

# Bytes read at a time; this limits the memory, not the file size.
_CHUNK = 1 << 20
# Bytes at each end of a file that signatures of earlier versions cover.
_END = 1 << 16
# A file changed less than this many seconds ago may change again with the same time: FAT has a resolution of 2 s.
_SETTLED = 3.0
# Rows of the cache; the oldest are removed first.
_MAX_ROWS = 1_000_000
# Files to hash before their digests are written.
_BATCH = 256
# Total bytes from which hashing reports progress.
_LARGE = 1 << 30

_LEGACY = re.compile(r"\d+-[0-9a-f]{16}")

_lock = threading.Lock()


def file_digest(path: StrPath) -> str:
    """SHA-256 of a file's content as 64 hex digits; "" if it is missing, unreadable or not a regular file.

    Reads the file in constant memory, and only if its digest is not cached.
    """
    return file_digests([path])[0]


def file_digests(paths: Sequence[StrPath], threads: int = 4) -> list[str]:
    """:func:`file_digest` of many files, in order.

    Args:
        threads: files read at a time.
    """
    pages = [split_page(path) for path in paths]
    if any(page for _, page in pages):  # of one file, each with a digest of its own
        files = file_digests([file for file, _ in pages], threads)
        return [
            hashlib.sha256(f"{digest} page {page}".encode()).hexdigest() if digest and page else digest
            for digest, (_, page) in zip(files, pages, strict=True)
        ]
    keys = [_key(path) for path in paths]
    known = _load(key for key, _ in keys if key is not None)
    missing = [i for i, (key, _) in enumerate(keys) if key is not None and key not in known]
    total, hashed = sum(keys[i][1] for i in missing), 0
    with (
        ThreadPoolExecutor(threads) as pool,
        count_steps("file hashes", total >> 20, unit="MiB", silent=total < _LARGE) as steps,
    ):
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            fresh = {}
            for i, (digest, keep) in zip(batch, pool.map(lambda i: _compute(paths[i]), batch), strict=True):
                key, size = keys[i]
                known[key] = digest
                if keep is not None:
                    fresh[keep] = digest
                hashed += size
                steps.advance((hashed >> 20) - steps.done)
            _store(fresh)
    return ["" if key is None else known[key] for key, _ in keys]


def check_digest(path: StrPath, prefix: str, what: str) -> None:
    """Raise :class:`ReclipError` unless a file's SHA-256 begins with the published hex digits.

    Args:
        what: what the message calls the file.
    """
    found = file_digest(path)
    if not found.startswith(prefix):
        raise ReclipError(
            f"{what}: {path} is not the published file: its SHA-256 begins with"
            f" {found[: len(prefix)] or 'nothing'} instead of {prefix}: remove it to download it again"
        )


def current_digest(recorded: str, path: StrPath) -> str:
    """Update a digest that was recorded for a file.

    Earlier versions recorded ``<size>-<hash of both ends>``. If that still matches the file, the file's digest is
    returned. Anything else is returned unchanged, and so differs from the digest of a file with other content.
    """
    if not _LEGACY.fullmatch(recorded) or recorded != _legacy_signature(path):
        return recorded
    return file_digest(path)


def _legacy_signature(path: StrPath) -> str:
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest = hashlib.sha256(stream.read(_END))
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    except (ReclipError, OSError):
        return ""
    return f"{size}-{digest.hexdigest()[:16]}"


def _status_key(path: StrPath, status: os.stat_result) -> str:
    fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    name = f"{os.path.abspath(path)}\0{fields}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).hexdigest()


def _key(path: StrPath) -> tuple[str | None, int]:
    """Current key of a file, and its size; None if it is not a regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None, 0
    return (_status_key(path, status), status.st_size) if stat.S_ISREG(status.st_mode) else (None, 0)


def _compute(path: StrPath) -> tuple[str, str | None]:
    """Digest of a file, and its key in the cache; the key is None if the file changed recently or while it was read."""
    try:
        with open_regular(path) as stream:
            now, before = time.time(), os.fstat(stream.fileno())
            digest = hashlib.sha256()
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
            after = os.fstat(stream.fileno())
    except (ReclipError, OSError):
        return "", None
    key = _status_key(path, before)
    settled = max(before.st_mtime, before.st_ctime) < now - _SETTLED and key == _status_key(path, after)
    return digest.hexdigest(), key if settled else None


# ---- the cache: if it is unusable (unwritable folder, damaged file), everything is computed ------------------------


@contextlib.contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """The cache, for one short transaction; other processes and threads wait."""
    path = cache_dir() / "digests.sqlite"
    with _lock:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS digests (key TEXT PRIMARY KEY, digest TEXT NOT NULL)")
            yield connection


def _load(keys: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        with _database() as connection:
            for key in keys:
                row = connection.execute("SELECT digest FROM digests WHERE key = ?", (key,)).fetchone()
                if row is not None and isinstance(row[0], str) and len(row[0]) == hashlib.sha256().digest_size * 2:
                    found[key] = row[0]
    except (OSError, sqlite3.OperationalError):  # no folder, or the lock timed out
        pass
    except sqlite3.DatabaseError:
        _remove_damaged(cache_dir())
    return found


def _store(digests: dict[str, str]) -> None:
    if not digests:
        return
    with contextlib.suppress(OSError, sqlite3.Error), _database() as connection:
        connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?)", digests.items())
        newest = connection.execute("SELECT max(rowid) FROM digests").fetchone()[0]
        connection.execute("DELETE FROM digests WHERE rowid <= ?", (newest - _MAX_ROWS,))


@functools.cache  # once per process: another one may have started an intact file meanwhile
def _remove_damaged(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "digests.sqlite").unlink(missing_ok=True)
