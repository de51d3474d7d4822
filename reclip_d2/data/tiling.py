"""Cutting images into windows and tiles.

Shape letters: (H, W) size of the image in pixels.
"""

from __future__ import annotations

import dataclasses

from detectron2.config import CfgNode


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis: steps of ``stride``, the last window aligned with the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """``INPUT.TILES``: how very large images are processed.

    Attributes:
        from_side: images whose longer side exceeds this are cut into tiles.
        size: side of a tile in pixels.
        overlap: fraction of a tile's side by which neighbours overlap in prediction, in [0, 1).
    """

    from_side: int
    size: int
    overlap: float

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Tiling:
        """The tiling of ``INPUT.TILES``."""
        return cls(cfg.INPUT.TILES.FROM_SIDE, cfg.INPUT.TILES.SIZE, cfg.INPUT.TILES.OVERLAP)

    def applies_to(self, size: tuple[int, int]) -> bool:
        """Whether an image of (H, W) pixels is cut into tiles."""
        return max(size) > self.from_side

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next in prediction."""
        return max(1, round(self.size * (1 - self.overlap)))


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """``TEST.SLIDING_WINDOW``: the usual protocol in the literature, overlapping windows of the resized image.

    Attributes:
        size: (height, width) of a window, in pixels of the network's input.
        stride: (rows, columns) from one window to the next.
    """

    size: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SlidingWindow | None:
        """The windows of ``TEST.SLIDING_WINDOW``; None if it is off."""
        keys = cfg.TEST.SLIDING_WINDOW
        return cls(tuple(keys.SIZE), tuple(keys.STRIDE)) if keys.ENABLED else None
