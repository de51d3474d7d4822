"""Locks of an output folder that several runs with ``--shard`` fill at once.

Each run holds the lock of its shard while it computes, and the folder's own lock only while it reads or changes what
all share: the recorded state, the list of images without masks, and the summary. A run without ``--shard`` holds the
folder's lock all the time, and does not start while a shard's is held.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from reclip_d2.utils.locks import LOCK_NAME, exclusive, try_lock, waiting
from reclip_d2.utils.work_shard import WorkShard

_SHARD_LOCK = re.compile(r"\.shard-\d+-of-\d+\.lock")


def is_shard_lock(name: str) -> bool:
    """Whether a file name is that of a shard's lock."""
    return _SHARD_LOCK.fullmatch(name) is not None


def running_shard(folder: Path) -> str:
    """Name of a shard whose run is working in ``folder``; "" if there is none."""
    for path in sorted(folder.glob(".shard-*.lock")):
        if not is_shard_lock(path.name):
            continue
        lock = try_lock(path)
        if lock is None:
            return path.name.removeprefix(".shard-").removesuffix(".lock")
        lock.release()
    return ""


@contextlib.contextmanager
def shard_lock(folder: Path, shard: WorkShard) -> Iterator[None]:
    """Hold the lock of a shard.

    Raises:
        ReclipError: another run of the shard holds it.
    """
    busy = f"another run of shard {shard} is using {folder}: wait for it, or name another --output"
    with exclusive(folder / f".shard-{shard.name}.lock", busy):
        yield


@contextlib.contextmanager
def shared_state(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for a short time; waits for other runs."""
    with waiting(folder / LOCK_NAME, f"another run that is using {folder}"):
        yield
