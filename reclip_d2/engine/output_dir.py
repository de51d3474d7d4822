"""``OUTPUT_DIR`` of a training: its lock, intermediate checkpoints, and files of earlier runs."""

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

# Names of Detectron2's PeriodicCheckpointer.
_INTERMEDIATE = re.compile(r"model_\d{7,}\.pth")


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Lock ``OUTPUT_DIR`` against other training runs, and remove half-written files of killed ones.

    Creates the folder if needed. Called by all processes; the lock is released when the main process ends in any way.

    Raises:
        ReclipError: another training uses the folder.
    """
    lock = try_lock(Path(folder, LOCK_NAME)) if comm.is_main_process() else None
    if not comm.all_gather(lock is not None)[0]:
        raise ReclipError(f"another training is running in {folder}: wait for it, or choose another OUTPUT_DIR")
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
    """Whether a file is a half-written checkpoint, or another half-written file of a training."""
    name = path.name[1:].rpartition(".tmp")[0].rpartition(".")[0]  # NAME in .NAME.XXXXXXXX.tmp.SUFFIX
    known = name in (FINAL_CHECKPOINT, LAST_CHECKPOINT, "training.json") or _INTERMEDIATE.fullmatch(name) is not None
    return known and is_temporary(path, of=name)


def remove_intermediate_checkpoints(folder: Path) -> None:
    """Remove all checkpoints but ``model_final.pth``, if that exists."""
    final = folder / FINAL_CHECKPOINT
    if not final.is_file():
        return
    found = [path for path in folder.glob("model_*.pth") if _INTERMEDIATE.fullmatch(path.name)]
    if found and (folder / LAST_CHECKPOINT).is_file():
        point_to(final)  # in case the training was killed just before this
    for path in found:
        path.unlink(missing_ok=True)


def forget_run(folder: str) -> None:
    """Remove checkpoints and metrics of an earlier run, so that ``--resume`` cannot continue it.

    Called by all processes, after the new run has loaded its initial weights.
    """
    comm.synchronize()
    if not comm.is_main_process():
        return
    Path(folder, LAST_CHECKPOINT).unlink(missing_ok=True)  # first, so that it never names a removed file
    for path in Path(folder).glob("model_*.pth"):
        if path.name == FINAL_CHECKPOINT or _INTERMEDIATE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.truncate(Path(folder, "metrics.json"), 0)  # not removed: the new run's writer has it open
