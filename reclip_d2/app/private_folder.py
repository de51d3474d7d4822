"""Temporary folders that are removed when the program ends, and leftovers of killed programs.

Only verified leftovers are removed: a real folder (not a link) of this user that holds the marker of
:func:`private_folder`, while neither the page that made it nor a training in it is running.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reclip_d2.errors import ReclipError
from reclip_d2.utils.json_files import JsonError, parse_json
from reclip_d2.utils.locks import exclusive
from reclip_d2.workspace.run_folder import RunFolder

MARKER = ".reclip-app.json"
_LOCK = ".reclip-app.lock"
_FORMAT = "reclip_d2 app folder 1"
_MARKER_BYTES = 1024


@contextlib.contextmanager
def private_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder (absolute path), removed at the end of the block. Leftovers in ``parent`` are removed first.

    Args:
        prefix: of the folder's name.
    """
    remove_leftovers(parent, prefix)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix)).absolute()
    try:
        with exclusive(folder / _LOCK, f"{folder} is in use"):
            # After locking: wherever the marker exists, the lock is held.
            (folder / MARKER).write_text(json.dumps({"format": _FORMAT, "folder": folder.name}), encoding="utf-8")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> list[Path]:
    """Remove folders of :func:`private_folder` that killed programs have left.

    Returns:
        the removed folders.
    """
    removed = []
    for folder in sorted(parent.glob(f"{prefix}*")):
        if not _is_leftover(folder):
            continue
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(exclusive(folder / _LOCK, f"{folder} is in use"))
                for run in folder.glob("**/training-*/out"):  # a training may briefly outlive its page
                    stack.enter_context(RunFolder(run).lock())
                if not _is_leftover(folder):  # removed by someone else in the meantime
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except (ReclipError, OSError):
            continue
    return removed


def _is_leftover(folder: Path) -> bool:
    marker = folder / MARKER
    try:
        status, marker_status = folder.lstat(), marker.lstat()
        if not stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(marker_status.st_mode):
            return False
        if hasattr(os, "getuid") and {status.st_uid, marker_status.st_uid} != {os.getuid()}:
            return False
        if marker_status.st_size > _MARKER_BYTES:
            return False
        content = parse_json(marker.read_bytes())
    except (OSError, JsonError):
        return False
    return content == {"format": _FORMAT, "folder": folder.name}
