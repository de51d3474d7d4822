"""The windows of a GeoTIFF that a model is trained on, in place of the scene as a whole.

Shape letters: (H, W) size of the scene in pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
from detectron2.config import CfgNode

from reclip_d2.data.geotiff import Scene
from reclip_d2.data.tiling import Tiling, window_starts
from reclip_d2.errors import ReclipError

MOST_PLACES = 10_000_000


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """``INPUT.GEO.WINDOWS``: which windows of a scene are training images.

    Attributes:
        size: side in pixels, that of the tiles in prediction (``INPUT.TILES.SIZE``), so that both see the same scale.
        stride: pixels from one window to the next; the last one of a row or column is aligned with the end.
        most: maximum number of windows of a scene.
        min_valid: smallest share of pixels with data.
        seed: of the draw, with the scene's name.
    """

    size: int
    stride: int
    most: int
    min_valid: float
    seed: int

    @classmethod
    def from_config(cls, cfg: CfgNode) -> WindowPlan:
        """From the keys ``INPUT.GEO.WINDOWS`` and ``INPUT.TILES.SIZE``."""
        keys = cfg.INPUT.GEO.WINDOWS
        size = cfg.INPUT.TILES.SIZE
        stride = Tiling(0, size, keys.OVERLAP).stride
        return cls(size, stride, keys.PER_SCENE, keys.MIN_VALID, keys.SEED)

    def places(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Top and left of all windows of a scene of (H, W) pixels, row by row.

        Raises:
            ReclipError: they are too many to draw from.
        """
        if (number := self._number(size)) > MOST_PLACES:
            raise ReclipError(
                f"a GeoTIFF of {size[1]} x {size[0]} pixels has {number:,} windows of {self.size} pixels, more than"
                f" {MOST_PLACES:,}: raise INPUT.TILES.SIZE, or cut the file"
            )
        rows, columns = (window_starts(side, self.size, self.stride) for side in size)
        return [(top, left) for top in rows for left in columns]

    def count(self, size: tuple[int, int]) -> int:
        """Number of windows of a scene of (H, W) pixels, if all have data."""
        return min(self.most, self._number(size))

    def _number(self, size: tuple[int, int]) -> int:
        """Number of all places."""
        rows, columns = (1 + max(0, -(-(side - self.size) // self.stride)) for side in size)
        return rows * columns


def draw_windows(scene: Scene, plan: WindowPlan, name: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Top, left and RGB pixels ``(h, w, 3)`` uint8 of a scene's training windows.

    The places are drawn without replacement; those with too little data are passed over. If all have too little, the
    one with the most is taken; a scene without data has none. Memory is that of one window.

    Args:
        name: of the scene, so that scenes of one size have different windows.
    """
    height, width, _ = scene.shape
    places = plan.places((height, width))
    digest = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    order = np.random.default_rng([plan.seed, digest]).permutation(len(places))
    wanted, done, fullest, largest = plan.most, 0, None, 0.0
    while wanted and done < len(order):
        # As many as are wanted, in the file's order, so that few blocks are decoded twice.
        drawn = sorted(order[done : done + wanted])
        done += len(drawn)
        for place in (places[index] for index in drawn):
            pixels, share = scene.window_and_share(*_slices(place, plan.size, (height, width)))
            if pixels is not None and share >= plan.min_valid:
                wanted -= 1
                yield *place, pixels
            elif share > largest:
                fullest, largest = place, share
    if wanted == plan.most and fullest is not None:
        yield *fullest, scene.window(*_slices(fullest, plan.size, (height, width)))


def _slices(place: tuple[int, int], side: int, size: tuple[int, int]) -> tuple[slice, slice]:
    top, left = place
    return slice(top, min(top + side, size[0])), slice(left, min(left + side, size[1]))
