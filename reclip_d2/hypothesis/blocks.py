"""Scores of a data set's images in small files, so that a killed run goes on where it was and processes can share.

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
    """Blocks of consecutive images, one ``.npz`` of arrays each, in a folder beside the final file.

    The folder's name holds a hash of all that the scores depend on: a run with other settings begins anew.
    """

    def __init__(self, path: Path, image_ids: Sequence[str], key: object, size: int = BLOCK_SIZE) -> None:
        """
        Args:
            path: the file that will be made from the blocks.
            image_ids: of all images, in order.
            key: what else the scores depend on; anything JSON can write.
            size: images of a block.
        """
        digest = hashlib.sha256(json.dumps([list(image_ids), key, size]).encode()).hexdigest()[:12]
        self.folder = path.parent / f"{path.name}.parts-{digest}"
        self.images = [range(i, min(i + size, len(image_ids))) for i in range(0, len(image_ids), size)]

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:06d}.npz"

    def missing(self, is_sound: Callable[[dict[str, np.ndarray], int], bool]) -> list[int]:
        """Blocks that are still to be made: their file is missing, damaged or of another shape.

        Args:
            is_sound: of the arrays of a block and its number of images.
        """
        return [block for block in range(len(self.images)) if not self._is_there(block, is_sound)]

    def _is_there(self, block: int, is_sound: Callable[[dict[str, np.ndarray], int], bool]) -> bool:
        if not self._file(block).exists():
            return False
        try:
            return is_sound(self.read(block), len(self.images[block]))
        except ReclipError:
            return False

    def write(self, block: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a block; its file appears when it is whole."""
        with atomic_write(self._file(block)) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)

    def read(self, block: int) -> dict[str, np.ndarray]:
        """Arrays of a block.

        Raises:
            ReclipError: the file is damaged; it is removed, so that the next run makes it anew.
        """
        file = self._file(block)
        try:
            with np.load(file, allow_pickle=False) as arrays:  # a plain array is no context
                return dict(arrays)
        except (OSError, ValueError, EOFError, MemoryError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            file.unlink(missing_ok=True)
            raise ReclipError(f"{file} was damaged and is removed: run again, the other parts are kept") from error

    def remove(self) -> None:
        """Remove all blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_blocks(path: Path) -> None:
    """Remove the blocks of a file that is made: a run that was killed at its end left them, or one of other settings
    that never ended. Whatever else lies in a folder of such a name stays."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.parts-*"):
        if not re.fullmatch(r"[0-9a-f]{12}", folder.name.rpartition("-")[2]) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):  # another run does the same, or may not write here
            remove_leftovers(folder)
            for file in folder.glob("[0-9]*.npz"):
                if re.fullmatch(r"\d{6,}\.npz", file.name):
                    file.unlink(missing_ok=True)
            folder.rmdir()
