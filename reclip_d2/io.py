"""Files: atomic writing, and the folder where computed files are cached."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from reclip_d2.utils.files import check_output_file

# Bytes of a file's name that its temporary name repeats: a name may have 255 bytes in all, on some file systems fewer.
_PREFIX_BYTES = 100


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an error.

    A reader never sees a half-written file: the name appears only when the content is complete. On an error
    (or an interrupt) the temporary file is removed and ``path`` is left as it was.

    Raises:
        ReclipError: ``path`` is a folder, a device or anything else that is not a regular file.
    """
    check_output_file(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _make_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_beside(path: Path) -> Path:
    """Make an empty file of a new name, with the permissions that a plain open() would give."""
    # Not by mkstemp: its files are private, and the umask that they lack can be read only by changing it, which in
    # another thread would take effect.
    prefix = path.name.encode("utf-8", "surrogateescape")[:_PREFIX_BYTES].decode("utf-8", "ignore")
    while True:
        temporary = path.with_name(f".{prefix}.{secrets.token_hex(4)}.tmp{path.suffix}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return temporary


def cache_dir() -> Path:
    """Folder for computed files that runs share (text features, hypotheses): ``$RECLIP_CACHE``, by default
    ``~/.cache/reclip_d2``."""
    return Path(os.environ.get("RECLIP_CACHE", "~/.cache/reclip_d2")).expanduser()
