"""Of several runs, each with several processes, one makes a file or folder that all need."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

from reclip_d2.utils.locks import lock_path, try_lock

logger = logging.getLogger(__name__)

# Seconds after which a process that waits for the lock tells the others of its run that it is alive.
_POLL = 20.0


@contextlib.contextmanager
def one_maker(path: Path, what: str) -> Iterator[None]:
    """Context in which only this run makes ``path``; entered by all processes of the run.

    The main process takes the lock. The others wait in short collective operations: a single one that lasts as long as
    another run's work would time out.

    Args:
        what: what the log calls ``path``.
    """
    lock, said = None, False
    while True:
        if comm.is_main_process():
            lock = try_lock(lock_path(path), _POLL if said else 0.0)
        if comm.all_gather(lock is not None)[0]:
            break
        if not said:
            logger.info("waiting for another run to make the %s %s", what, path)
        said = True
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
