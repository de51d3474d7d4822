"""Folders that go with the program, and what a program that was killed has left of them.

A folder is removed only if it proves to be such a leftover: it is a folder and no link, belongs to this user, holds the
marker of :func:`private_folder`, and neither the page that made it nor a training in it is running.
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
    """A new folder, absolute, that is removed at the end of the block; leftovers beside it are removed first.

    Args:
        prefix: of its name.
    """
    remove_leftovers(parent, prefix)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix)).absolute()
    try:
        with exclusive(folder / _LOCK, f"{folder} is in use"):
            # Only now: who finds the marker finds the lock taken.
            (folder / MARKER).write_text(json.dumps({"format": _FORMAT, "folder": folder.name}), encoding="utf-8")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> list[Path]:
    """Remove the folders that :func:`private_folder` has made and a killed program has left.

    Returns:
        what was removed.
    """
    removed = []
    for folder in sorted(parent.glob(f"{prefix}*")):
        if not _is_ours(folder):
            continue
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(exclusive(folder / _LOCK, f"{folder} is in use"))
                for run in folder.glob("**/training-*/out"):  # the training may outlive the page by a moment
                    stack.enter_context(RunFolder(run).lock())
                if not _is_ours(folder):  # someone else has removed it in the meantime
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except (ReclipError, OSError):
            continue
    return removed


def _is_ours(folder: Path) -> bool:
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
