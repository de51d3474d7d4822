"""Masks of GeoTIFFs: tiled, compressed GeoTIFFs of class ids with the same georeference.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reclip_d2.data.geotiff import Scene, gdal
from reclip_d2.formats.classes import MaskClasses
from reclip_d2.utils.io import atomic_write

_BLOCK = 512
IGNORE = 255


class GeoMaskWriter:
    """Writes one mask from top to bottom, in whole rows of blocks, so that no block is compressed twice.

    The file has uint8 ids with nodata 255, the classes' colours as its palette, and tags: ``CLASS_k`` of the band is
    the name of id k, ``CLASSES`` of the file all names as JSON, ``BANDS`` how the image was read.
    """

    def __init__(self, path: Path, scene: Scene, classes: MaskClasses) -> None:
        """
        Args:
            path: the file; it appears when the ``with`` block ends without an error.
            scene: the image; open for as long as this is.
            classes: at most 255.
        """
        self._path, self._scene, self._classes = path, scene, classes
        self._rows: list[np.ndarray] = []
        self._waiting = self._written = 0
        self.pixels = np.zeros(256, np.int64)
        """Pixels of each id."""

    def __enter__(self) -> GeoMaskWriter:
        self._atomic = atomic_write(self._path)
        self._temporary = self._atomic.__enter__()
        self._file: Any = None
        try:
            self._file = self._create()
        except BaseException as error:
            self._atomic.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _create(self) -> Any:  # noqa: ANN401 (rasterio is optional)
        source = self._scene.dataset
        height, width, _ = self._scene.shape
        with gdal() as rasterio:
            file = rasterio.open(
                self._temporary, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8",
                nodata=IGNORE, tiled=True, blockxsize=_BLOCK, blockysize=_BLOCK, compress="deflate",
                bigtiff="IF_SAFER",
            )  # fmt: skip
            points, points_crs = source.gcps
            if points:
                file.gcps = (points, points_crs)
            else:
                file.transform = source.transform
                if source.crs is not None:
                    file.crs = source.crs
            if source.rpcs is not None:
                file.rpcs = source.rpcs
            file.write_colormap(1, {k: (*color, 255) for k, color in enumerate(self._classes.colors)} | _TRANSPARENT)
            file.update_tags(CLASSES=json.dumps(self._classes.names, ensure_ascii=False), BANDS=str(self._scene))
            file.update_tags(1, **{f"CLASS_{k}": name for k, name in enumerate(self._classes.names)})
        return file

    def add(self, labels: np.ndarray) -> None:
        """Add the next rows ``(rows, W)`` uint8."""
        self.pixels += np.bincount(labels.ravel(), minlength=256)
        self._rows.append(labels)
        self._waiting += len(labels)
        if self._waiting >= _BLOCK:
            rows = np.concatenate(self._rows)
            whole = len(rows) // _BLOCK * _BLOCK
            self._write(rows[:whole])
            self._rows = [rows[whole:].copy()]
            self._waiting = len(rows) - whole

    def _write(self, rows: np.ndarray) -> None:
        if len(rows):
            window = ((self._written, self._written + len(rows)), (0, rows.shape[1]))
            self._file.write(rows, 1, window=window)
            self._written += len(rows)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:  # noqa: ANN401
        try:
            if kind is None and self._rows:
                self._write(np.concatenate(self._rows))
            self._file.close()
        except BaseException as failure:
            self._atomic.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._atomic.__exit__(kind, error, traceback)


_TRANSPARENT = {IGNORE: (0, 0, 0, 0)}


def read_rows(path: Path) -> Iterator[np.ndarray]:
    """The ids of a mask from top to bottom, in rows of blocks ``(rows, W)`` uint8."""
    with gdal() as rasterio, rasterio.open(path, driver="GTiff") as file:
        for top in range(0, file.height, _BLOCK):
            yield file.read(1, window=((top, min(top + _BLOCK, file.height)), (0, file.width)))


def read_part(path: Path, rows: slice, columns: slice) -> np.ndarray:
    """The ids ``(rows, columns)`` uint8 of a part of a mask."""
    with gdal() as rasterio, rasterio.open(path, driver="GTiff") as file:
        return file.read(1, window=((rows.start, rows.stop), (columns.start, columns.stop)))


def count_geo_pixels(path: Path) -> dict[str, int]:
    """Pixels per id of a mask."""
    total = sum(np.bincount(rows.ravel(), minlength=256) for rows in read_rows(path))
    return {str(label): int(total[label]) for label in np.flatnonzero(total)}
