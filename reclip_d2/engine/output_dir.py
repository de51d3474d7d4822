"""``OUTPUT_DIR`` of a training: its lock, its intermediate checkpoints, and what an earlier run left there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import FINAL_CHECKPOINT, LAST_CHECKPOINT, point_to
from reclip_d2.utils.io import is_temporary
from reclip_d2.utils.locks import LOCK_NAME, try_lock

# As Detectron2's PeriodicCheckpointer names them.
_INTERMEDIATE = re.compile(r"model_\d{7,}\.pth")


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Keep other trainings out of ``OUTPUT_DIR``, which is made if need be, and remove what a killed one left half
    written. Called by all processes; the lock is released when the main one ends, however it ends.

    Raises:
        ReclipError: another training is running there.
    """
    lock = try_lock(Path(folder, LOCK_NAME)) if comm.is_main_process() else None
    if not comm.all_gather(lock is not None)[0]:
        raise ReclipError(f"another training works in {folder}: wait for it, or choose another OUTPUT_DIR")
    try:
        if lock is not None:
            for path in Path(folder).iterdir():
                if is_temporary_of_run(path):
                    path.unlink(missing_ok=True)
        yield
    finally:
        if lock is not None:
            lock.release()


def is_temporary_of_run(path: Path) -> bool:
    """Whether a file is a half-written checkpoint, or another file of a training."""
    name = path.name[1:].rpartition(".tmp")[0].rpartition(".")[0]  # of .NAME.XXXXXXXX.tmp.SUFFIX
    known = name in (FINAL_CHECKPOINT, LAST_CHECKPOINT, "training.json") or _INTERMEDIATE.fullmatch(name) is not None
    return known and is_temporary(path, of=name)


def remove_intermediate_checkpoints(folder: Path) -> None:
    """Remove all checkpoints but ``model_final.pth``, if that exists."""
    final = folder / FINAL_CHECKPOINT
    if not final.is_file():
        return
    found = [path for path in folder.glob("model_*.pth") if _INTERMEDIATE.fullmatch(path.name)]
    if found and (folder / LAST_CHECKPOINT).is_file():
        point_to(final)  # the training may have been killed before it did so
    for path in found:
        path.unlink(missing_ok=True)


def forget_run(folder: str) -> None:
    """Remove checkpoints and metrics of an earlier run, so that ``--resume`` cannot continue it.

    Called by all processes, after the new run has read the weights that it starts from.
    """
    comm.synchronize()
    if not comm.is_main_process():
        return
    Path(folder, LAST_CHECKPOINT).unlink(missing_ok=True)  # first: it never names a file that is gone
    for path in Path(folder).glob("model_*.pth"):
        if path.name == FINAL_CHECKPOINT or _INTERMEDIATE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.truncate(Path(folder, "metrics.json"), 0)  # truncated: the new run's writer has it open to append
