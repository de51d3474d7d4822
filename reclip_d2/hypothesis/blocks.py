"""Scores of a data set's images in small files, so that an interrupted run can resume and processes can share the work.

Shape letters: n images of a block, N windows of an image, C classes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write, remove_leftovers

BLOCK_SIZE = 64


class ScoreBlocks:
    """Blocks of consecutive images, each an ``.npz`` file of arrays, in a folder next to the final file.

    The folder's name contains a hash of all that the scores depend on: a run with other settings starts from scratch.
    """

    def __init__(self, path: Path, image_ids: Sequence[str], key: object, size: int = BLOCK_SIZE) -> None:
        """
        Args:
            path: final file, to be written from the blocks.
            image_ids: ids of all images, in order.
            key: what else the scores depend on; a JSON value.
            size: images per block.
        """
        digest = hashlib.sha256(json.dumps([list(image_ids), key, size]).encode()).hexdigest()[:12]
        self.folder = path.parent / f"{path.name}.parts-{digest}"
        self.images = [range(i, min(i + size, len(image_ids))) for i in range(0, len(image_ids), size)]

    def file(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"{block:06d}.npz"

    def missing(self, is_sound: Callable[[dict[str, np.ndarray], int], bool]) -> list[int]:
        """Blocks whose file is missing, damaged or of another shape.

        Args:
            is_sound: checks the arrays of a block, given its number of images.
        """
        return [block for block in range(len(self.images)) if not self._is_complete(block, is_sound)]

    def _is_complete(self, block: int, is_sound: Callable[[dict[str, np.ndarray], int], bool]) -> bool:
        if not self.file(block).exists():
            return False
        try:
            return is_sound(self.read(block), len(self.images[block]))
        except ReclipError:
            return False

    def write(self, block: int, arrays: dict[str, np.ndarray]) -> None:
        """Write a block's file atomically."""
        with atomic_write(self.file(block)) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)

    def read(self, block: int) -> dict[str, np.ndarray]:
        """Arrays of a block.

        Raises:
            ReclipError: the file is damaged; it is removed, so that the next run recomputes it.
        """
        file = self.file(block)
        try:
            with np.load(file, allow_pickle=False) as arrays:  # fails for a single array, which is not a context
                return dict(arrays)
        except (OSError, ValueError, EOFError, MemoryError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            file.unlink(missing_ok=True)
            raise ReclipError(f"{file} was damaged and has been removed: run again, other parts are kept") from error

    def remove(self) -> None:
        """Remove all blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_blocks(path: Path) -> None:
    """Remove leftover blocks of a finished file, from runs that were killed or had other settings. Other files in these
    folders are not touched."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.parts-*"):
        if not re.fullmatch(r"[0-9a-f]{12}", folder.name.rpartition("-")[2]) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):  # another run removes them too, or the folder is read-only
            remove_leftovers(folder)
            for file in folder.glob("[0-9]*.npz"):
                if re.fullmatch(r"\d{6,}\.npz", file.name):
                    file.unlink(missing_ok=True)
            folder.rmdir()
