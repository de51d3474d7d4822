"""GeoTIFFs for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_geotiff(
    path: Path, values: np.ndarray, *, colors: Sequence[str] = (), driver: str = "GTiff", **options: Any
) -> Path:
    """Write values ``(B, H, W)`` of any type; returns the path.

    Args:
        colors: names of the bands' colour interpretations.
        options: of :func:`rasterio.open`; by default there is a transform of 10 m per pixel and EPSG:32633.
    """
    import rasterio  # optional

    options = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **options}
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver=driver, **shape, **options) as file:
        file.write(values)
        if colors:
            file.colorinterp = [getattr(rasterio.enums.ColorInterp, name) for name in colors]
    return path
