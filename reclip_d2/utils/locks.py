"""Locks between processes, with the ``filelock`` library: they work on all platforms and end with their process.

A lock is an empty file that is never removed; its existence does not mean that the lock is held.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
"""The lock file of a folder that only one program at a time may use."""

# Errors of file systems without locks, such as some network file systems; there, users must not run two programs.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class Lock:
    """A lock that this process holds until :meth:`release`, or until the process ends in any way."""

    def __init__(self, lock: filelock.BaseFileLock | None) -> None:
        """
        Args:
            lock: the lock held; None if the file system has no locks.
        """
        self._lock = lock

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()


def lock_path(file: Path) -> Path:
    """The lock file for making ``file``, in the same folder."""
    return file.with_name(f".{file.name}{LOCK_NAME}")


def try_lock(path: str | os.PathLike[str], seconds: float = 0.0) -> Lock | None:
    """Try to take a lock.

    Args:
        path: the lock file; it and its folder are created if necessary.
        seconds: how long to wait.

    Returns:
        The lock; None if another process (or another part of this one) holds it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("no locks on the file system of %s: do not run two programs there at once", path)
        return Lock(None)
    return Lock(lock)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Hold a lock, or raise :class:`ReclipError` with the message ``busy`` if another process holds it."""
    lock = try_lock(path)
    if lock is None:
        raise ReclipError(busy)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def waiting(path: str | os.PathLike[str], waits_for: str) -> Iterator[None]:
    """Hold a lock; if another process holds it, log a message and wait.

    Args:
        waits_for: completes the message "waiting for ...".
    """
    lock = try_lock(path)
    if lock is None:
        logger.info("waiting for %s", waits_for)
    while lock is None:
        lock = try_lock(path, seconds=60.0)
    try:
        yield
    finally:
        lock.release()
