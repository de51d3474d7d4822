"""Atomic writing of files, and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from reclip_d2.utils.files import check_output_file

# Bytes of a file's name that its temporary name repeats: names are limited to 255 bytes, on some file systems fewer.
_PREFIX_BYTES = 100


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` when the block ends without an error.

    A reader never sees a half-written file: the name appears only when the content is complete. On an error
    (or an interrupt) the temporary file is removed and ``path`` is unchanged.

    Raises:
        ReclipError: ``path`` exists and is not a regular file.
        OSError: it cannot be written; the error always names ``path``.
    """
    check_output_file(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _make_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # on a full disk, a write error names no file, and libraries hide even the cause
        own = error.filename is None or error.filename == os.fspath(temporary)
        if not own or type(error).__module__ != "builtins":  # about another file, or a library's own type of error
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add ``path`` to system errors in the block that name no file, as when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _make_beside(path: Path) -> Path:
    """Create an empty file with a new name, with the permissions that a plain open() would give."""
    # Not mkstemp: its files are private, and the umask can only be read by changing it, which affects other threads.
    while True:
        temporary = path.with_name(f".{_prefix(path.name)}.{secrets.token_hex(4)}.tmp{path.suffix}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return temporary


def _prefix(name: str) -> str:
    return name.encode("utf-8", "surrogateescape")[:_PREFIX_BYTES].decode("utf-8", "ignore")


# Names of unfinished files of atomic_write, and of folders made by tempfile with the same ending.
_LEFTOVER = re.compile(r"\..*\.[a-z0-9_]{8}\.tmp(\.[^.]*)?")


def is_temporary(path: Path, of: str) -> bool:
    """Whether a file is a temporary file of :func:`atomic_write` for the name ``of``, left by a killed process."""
    pattern = rf"\.{re.escape(_prefix(of))}\.[0-9a-f]{{8}}\.tmp{re.escape(Path(of).suffix)}"
    return re.fullmatch(pattern, path.name) is not None and path.is_file() and not path.is_symlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files that killed runs left in a folder and below; links are not followed. Do not call it
    while another run writes there."""
    for parent, folders, files in os.walk(folder):
        for name in files:
            if _LEFTOVER.fullmatch(name):
                Path(parent, name).unlink(missing_ok=True)
        for name in list(folders):
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(Path(parent, name), ignore_errors=True)
                folders.remove(name)


def remove_leftovers_of(path: Path) -> None:
    """Remove half-written copies of a file that killed processes left. Do not call it while another process writes
    it."""
    for other in path.parent.glob(f".{glob.escape(_prefix(path.name))}.*"):
        if is_temporary(other, path.name):
            other.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Cache folder, shared by runs (text features, hypotheses): ``$RECLIP_CACHE``, by default
    ``~/.cache/reclip_d2``."""
    return Path(os.environ.get("RECLIP_CACHE", "~/.cache/reclip_d2")).expanduser()
