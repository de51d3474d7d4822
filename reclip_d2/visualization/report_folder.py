"""The folder of a bias report: what may be written where."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from reclip_d2.errors import ReclipError
from reclip_d2.utils.json_files import read_json

PAGE, NUMBERS = "index.html", "bias.json"
_SCHEMA = {
    "type": "object",
    "required": ["pictures"],
    "properties": {"pictures": {"type": "array"}},
}


def check_output_dir(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a report, unless ``overwrite``.

    Raises:
        ReclipError: there is a report, and ``overwrite`` is off; or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ReclipError(f"{folder} is a file: choose another --output-dir")
    if not overwrite and any((folder / name).exists() for name in (PAGE, NUMBERS)):
        raise ReclipError(f"{folder} holds a bias report: add --overwrite, or choose another --output-dir")


def remove_report(folder: Path) -> None:
    """Take away a report that stands in the folder: only files that it names as its own."""
    page, numbers = folder / PAGE, folder / NUMBERS
    with contextlib.suppress(ReclipError):  # no report of ours, or a damaged one: its pictures are not known
        for name in read_json(numbers, _SCHEMA, "report", "")["pictures"]:
            if isinstance(name, str) and re.fullmatch(r"[\w.+-]+\.png", name):
                (folder / name).unlink(missing_ok=True)
    page.unlink(missing_ok=True)
    numbers.unlink(missing_ok=True)


def file_part(name: str) -> str:
    """A name as part of a file name: ASCII letters, digits, and ``. + - _``."""
    return re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).strip("._") or "model"
