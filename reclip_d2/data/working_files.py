"""Smaller copies, tiles or windows, used for training in place of images that are too large to be read repeatedly."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from reclip_d2.data.geotiff import Scene, SceneReading
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import check_aspect
from reclip_d2.data.scene_windows import WindowPlan, draw_windows
from reclip_d2.data.tiling import Tiling, window_starts
from reclip_d2.utils.io import atomic_write


@dataclasses.dataclass(frozen=True)
class WorkingFiles:
    """Makes the files that replace large images and GeoTIFFs in hypotheses and training.

    Attributes:
        folder: where they are stored.
        tiling: ``INPUT.TILES``: which images are cut, and the tiles' size.
        copy_from: ``INPUT.COPIES``: images with more pixels are replaced by a copy, unless they are cut into tiles.
        copy_side: short side of a copy, in pixels.
        reading: ``INPUT.GEO``: how GeoTIFFs become RGB.
        windows: ``INPUT.GEO.WINDOWS``: their windows.
    """

    folder: Path
    tiling: Tiling
    copy_from: int
    copy_side: int
    reading: SceneReading
    windows: WindowPlan

    @classmethod
    def from_config(cls, cfg: CfgNode, folder: Path) -> WorkingFiles:
        """From the keys ``INPUT.TILES``, ``INPUT.COPIES`` and ``INPUT.GEO``."""
        copies = cfg.INPUT.COPIES
        reading, windows = SceneReading.from_config(cfg), WindowPlan.from_config(cfg)
        return cls(folder, Tiling.from_config(cfg), copies.FROM_PIXELS, copies.SHORT_SIDE, reading, windows)

    def rule(self, image: ImageFile) -> str:
        """All that an image's files depend on, except its content."""
        if image.is_scene:
            reading = self.reading
            return repr((reading.bands, reading.stretch, reading.percentiles, dataclasses.astuple(self.windows)))
        return repr((dataclasses.astuple(self.tiling), self.copy_from, self.copy_side))

    def make(self, image: np.ndarray, image_id: str) -> list[str]:
        """Write the files of an image ``(H, W, 3)`` uint8: JPEGs of quality 95.

        Returns:
            Their paths below :attr:`folder`; empty if the image itself is used.
        """
        height, width = image.shape[:2]
        if self.tiling.applies_to((height, width)):
            return self._cut(image, image_id)
        if height * width <= self.copy_from:
            return []
        scale = self.copy_side / min(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if scale >= 1:
            return []
        name = f"{image_id}.jpg"
        with atomic_write(self.folder / name) as temporary:
            _save(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=2.0), temporary)
        return [name]

    def make_windows(self, scene: Scene, image_id: str) -> list[str]:
        """Write the training windows of a GeoTIFF, as :meth:`make`; none if it has no pixel with data."""
        return self._write(draw_windows(scene, self.windows, image_id), f"{image_id}.windows")

    def _cut(self, image: np.ndarray, image_id: str) -> list[str]:
        """Tiles that cover the image; the last of a row or column overlaps the one before it."""
        side = self.tiling.size

        def tiles() -> Iterator[tuple[int, int, np.ndarray]]:
            for top in window_starts(image.shape[0], side, side):
                for left in window_starts(image.shape[1], side, side):
                    yield top, left, np.ascontiguousarray(image[top : top + side, left : left + side])

        return self._write(tiles(), f"{image_id}.tiles")

    def _write(self, parts: Iterable[tuple[int, int, np.ndarray]], folder_name: str) -> list[str]:
        """Write parts of an image, with their top and left, to a folder that appears with all of them."""
        target = self.folder / folder_name
        target.parent.mkdir(parents=True, exist_ok=True)
        names = []
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tiles.", suffix=".tmp") as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            for top, left, pixels in parts:
                name = f"{top:06d}_{left:06d}.jpg"
                _save(Image.fromarray(pixels), fresh / name)
                names.append(f"{target.name}/{name}")
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        parent = PurePosixPath(folder_name).parent
        return [str(parent / name) for name in sorted(names)]


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, "JPEG", quality=95, subsampling=0)


def check_shape(path: Path, size: tuple[int, int], tiling: Tiling) -> None:
    """Raise :class:`ReclipError` for an image that is too narrow to be used.

    Args:
        size: (H, W).
    """
    if not tiling.applies_to(size):
        check_aspect(path, size)
