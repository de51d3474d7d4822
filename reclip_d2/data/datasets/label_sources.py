"""Labels as the data sets ship them.

Shapes: H, W pixels of a label as it is stored; see :mod:`reclip_d2.data.datasets.label_orientation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from reclip_d2.data.index_images import MODES, PLAIN, Palette, index_size, read_index_image, read_palette
from reclip_d2.errors import ReclipError

_LARGEST_ID = 65535


class LabelSource(Protocol):
    """Where one image's label comes from."""

    def exists(self) -> bool:
        """Whether there is anything to read."""

    def declared_size(self) -> tuple[int, int]:
        """(H, W) that the label states, without decoding it."""

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """``(H, W)`` ids as the data set ships them, an integer dtype.

        Args:
            size: that must be its declared one: whatever else a file states is not decoded.
        """

    def has_palette(self) -> bool:
        """Whether pixels are indices into a table of colours."""

    def is_reordered(self) -> bool:
        """Whether the ids may differ from the stored numbers, because a palette is not in the order of the ids."""


@dataclass(frozen=True)
class IndexPNG:
    """A PNG whose pixels are ids: mode L, or P."""

    path: Path
    palette: Palette = PLAIN
    """What the colours of mode P mean."""

    def __str__(self) -> str:
        return f"label {self.path}"

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def declared_size(self) -> tuple[int, int]:
        """(H, W) in the header.

        Raises:
            ReclipError: the file is no PNG.
        """
        return index_size(self.path)

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """``(H, W)`` ids.

        Raises:
            ReclipError: the file cannot be read, has another size or depth, or colours that say nothing about ids.
        """
        return read_index_image(
            self.path,
            size,
            "its image",
            palette=self.palette,
            modes=MODES,
            wrong_mode="get the data set's own labels, PNGs of class ids of 8 bits",
        )

    def has_palette(self) -> bool:
        """Whether the mode is P."""
        return read_palette(self.path) is not None

    def is_reordered(self) -> bool:
        """Whether the palette is not in the order of the ids."""
        table = read_palette(self.path)
        return table is not None and not self.palette.is_order_of(table)


@dataclass(frozen=True)
class RunLengthLabel:
    """Run-length masks of COCO's format, painted in their order; pixels of none are 0."""

    name: str
    """How errors name it."""
    size: tuple[int, int]
    """(H, W)."""
    masks: tuple[tuple[int, Any], ...]
    """(category id, {"size": [H, W], "counts": ...}) each."""

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """Always: the masks are in memory."""
        return True

    def declared_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.size

    def has_palette(self) -> bool:
        """Never."""
        return False

    def is_reordered(self) -> bool:
        """Never."""
        return False

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """``(H, W)`` int64; where masks overlap the last one holds.

        Raises:
            ReclipError: a mask is not of the image's size or cannot be decoded, or its category is no id.
        """
        if self.size != size:
            raise ReclipError(f"{self} has size {list(self.size)}, its image {list(size)}: get the file again")
        label = np.zeros(self.size, dtype=np.int64)
        for category, segmentation in self.masks:
            if not isinstance(category, int) or not 0 <= category <= _LARGEST_ID:
                raise ReclipError(f"{self} has a mask of category {category!r:.40}, which is no id: get the file again")
            label[self._decode(segmentation)] = category
        return label

    def _decode(self, segmentation: Any) -> np.ndarray:
        try:
            if tuple(segmentation["size"]) != self.size:
                raise ReclipError(f"{self} has a mask of size {segmentation['size']}, not {list(self.size)}")
            counts = segmentation["counts"]
            runs = counts if isinstance(counts, list) else _run_lengths(counts)
            # The decoder leaves what no run covers as the memory was.
            if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != math.prod(self.size):
                raise ValueError(f"its runs do not cover the {math.prod(self.size)} pixels")
            if isinstance(counts, list):
                segmentation = coco_mask.frPyObjects(segmentation, *self.size)
            return coco_mask.decode(segmentation).astype(bool)
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            raise ReclipError(
                f"{self} has a mask that is no run-length code ({error!r}): get the file again"
            ) from error


def _run_lengths(code: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed code: five bits a character, the sixth says that more follow; from the third
    run on each is the difference to the one before the last. An unfinished code raises IndexError."""
    data = code.encode("ascii") if isinstance(code, str) else bytes(code)
    runs: list[int] = []
    position = 0
    while position < len(data):
        value = shift = 0
        while True:
            bits = data[position] - 48
            position += 1
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                break
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
