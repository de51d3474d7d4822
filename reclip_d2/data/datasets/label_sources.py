"""Labels in the formats that data sets ship.

Shape letters: (H, W) size in pixels of the label as stored; see :mod:`reclip_d2.data.datasets.label_orientation`.
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
        """Whether the label exists."""

    def declared_size(self) -> tuple[int, int]:
        """(H, W) that the label declares, without decoding it."""

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """``(H, W)`` ids of the data set, of an integer dtype.

        Args:
            size: (H, W) that the label must declare; otherwise it is not decoded.
        """

    def has_palette(self) -> bool:
        """Whether pixels are palette indices."""

    def is_reordered(self) -> bool:
        """Whether ids may differ from the stored indices, because the palette is not in the order of the ids."""


@dataclass(frozen=True)
class IndexPNG:
    """A PNG whose pixels are ids: mode L, or P."""

    path: Path
    palette: Palette = PLAIN
    """What the colours of a palette (mode P) mean."""

    def __str__(self) -> str:
        return f"label {self.path}"

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def declared_size(self) -> tuple[int, int]:
        """(H, W) of the header.

        Raises:
            ReclipError: the file is not a PNG.
        """
        return index_size(self.path)

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """``(H, W)`` ids.

        Raises:
            ReclipError: the file cannot be read, has another size or depth, or its palette does not define ids.
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
    """Run-length masks of COCO's format, painted in order; all other pixels are 0."""

    name: str
    """The label's name in errors."""
    size: tuple[int, int]
    """(H, W)."""
    masks: tuple[tuple[int, Any], ...]
    """Pairs (category id, {"size": [H, W], "counts": ...})."""

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """True: the masks are in memory."""
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
        """``(H, W)`` int64; where masks overlap, the last one wins.

        Raises:
            ReclipError: a mask has another size than the image or cannot be decoded, or its category is not an id.
        """
        if self.size != size:
            raise ReclipError(f"{self} has size {list(self.size)}, its image {list(size)}: get the file again")
        label = np.zeros(self.size, dtype=np.int64)
        for category, segmentation in self.masks:
            if not isinstance(category, int) or not 0 <= category <= _LARGEST_ID:
                raise ReclipError(
                    f"{self} has a mask of category {category!r:.40}, which is not an id: get the file again"
                )
            label[self._decode(segmentation)] = category
        return label

    def _decode(self, segmentation: Any) -> np.ndarray:
        try:
            if tuple(segmentation["size"]) != self.size:
                raise ReclipError(f"{self} has a mask of size {segmentation['size']}, not {list(self.size)}")
            counts = segmentation["counts"]
            runs = counts if isinstance(counts, list) else _run_lengths(counts)
            # The decoder leaves pixels that no run covers uninitialised.
            if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != math.prod(self.size):
                raise ValueError(f"its runs do not cover the {math.prod(self.size)} pixels")
            if isinstance(counts, list):
                segmentation = coco_mask.frPyObjects(segmentation, *self.size)
            return coco_mask.decode(segmentation).astype(bool)
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            raise ReclipError(
                f"{self} has a mask that is not a run-length code ({error!r}): get the file again"
            ) from error


def _run_lengths(code: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed code: five bits per character, the sixth means that more follow; from the third
    run on, each is the difference to the run two before it. An unfinished code raises IndexError."""
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
