"""Output paths: check before any work is done whether a folder or file can be created.

The check creates and removes an empty folder with a unique name where the path would begin: nothing else reveals a file
system that is full, read-only or special, like ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, check_output_file, display_path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # at least two letters: C:/ is a drive
_MAX_PATH, _MAX_NAME = 4095, 255


def check_output_folder(path: StrPath, what: str = "--output") -> Path:
    """The path of a folder that exists or can be created, with ``~`` expanded.

    Args:
        what: the option or key that names it, for errors.

    Raises:
        ReclipError: it is empty, a URL, a file or device, too long, not UTF-8, or not writable.
    """
    folder = _plain_path(path, what)
    _try_below(folder, folder, what)
    return folder


def check_output_path(path: StrPath, what: str = "--output") -> Path:
    """The path of a file that can be written, with ``~`` expanded; the file may exist, and so may its folder.

    Args:
        what: see :func:`check_output_folder`.

    Raises:
        ReclipError: see :func:`check_output_folder`; also if it exists and is not a regular file.
    """
    file = _plain_path(path, what)
    if os.fspath(path).endswith(("/", os.sep)) or file.name in ("", ".."):
        raise ReclipError(f"{what} {display_path(path)} is a folder: name a file")
    _try_below(file.parent, file, what)
    check_output_file(file, what)
    return file


def _plain_path(path: StrPath, what: str) -> Path:
    text = os.fspath(path)
    if not text.strip():
        raise ReclipError(f"{what} is empty: name a path")
    if _URL.match(text):
        raise ReclipError(f"{what} {display_path(text)} is a URL: name a local path, and copy it from there")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ReclipError(f"{what} {display_path(text)} is not UTF-8: name another path") from None
    if not text.isprintable():
        raise ReclipError(f"{what} {display_path(text)} has control characters: name another path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ReclipError(f"{what} {display_path(text)} is in the home of an unknown user") from error


def _try_below(folder: Path, path: Path, what: str) -> None:
    """Raise unless ``folder`` is writable or can be created; ``path`` is named in the message."""
    shown = display_path(path) if len(str(path)) <= 200 else f"{display_path(str(path)[:150])} ..."
    absolute = os.path.abspath(path)
    names = absolute.split(os.sep)
    if len(os.fsencode(absolute)) > _MAX_PATH or any(len(os.fsencode(name)) > _MAX_NAME for name in names):
        raise ReclipError(f"{what} {shown} is too long: name a shorter path")
    there = Path(os.path.abspath(folder))
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            kind = "is a file" if there.is_file() else "is not a folder"
            if there == Path(os.path.abspath(path)):
                raise ReclipError(f"{what} {shown} {kind}: name a folder")
            raise ReclipError(f"{what} {shown}: {display_path(there)} {kind}: name another path")
        made = tempfile.mkdtemp(prefix=".reclip-", dir=there)
        with contextlib.suppress(OSError):
            os.rmdir(made)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ReclipError(f"{what} {shown}: cannot write to {display_path(there)} ({reason})") from error
