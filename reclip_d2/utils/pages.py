"""Paths of a TIFF's pages: ``stack.tif/page_0002``, as if the file were a folder.

Everything that reads images by :func:`~reclip_d2.data.image_file.open_image` takes such a path, so that pages can be in
lists and records like files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_PAGE = re.compile(r"page_(\d{4,6})")
_EXTENSIONS = (".tif", ".tiff")


def page_path(path: Path, number: int) -> Path:
    """The path of a page, from 1."""
    return path / f"page_{number:04d}"


def split_page(path: str | os.PathLike[str]) -> tuple[str, int]:
    """File and number of a page, from 1; the path itself and 0 if it is not a page's."""
    text = os.fspath(path)
    file, name = os.path.split(text)
    match = _PAGE.fullmatch(name)
    if match is None or not file.lower().endswith(_EXTENSIONS) or os.path.isdir(file):
        return text, 0
    return file, int(match[1])
