"""GeoTIFFs and cloud-optimized GeoTIFFs, read in windows by rasterio: bands, stretch and nodata.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from reclip_d2.data.stretch import Limits, limits_of
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, check_regular, display_path

# GDAL's cache of decoded blocks, in MiB. By default it takes 5 % of the machine's memory. A row of tiles of a file that
# is stored in strips fits: 1024 rows of 50,000 pixels in three bands of 16 bits have 293 MiB.
CACHE_MIB = 320
# Sampled for the stretch, if the file has no overview: this many windows of this side along each axis.
_SAMPLE_WINDOWS, _SAMPLE_SIDE = 8, 256
_SAMPLE_LONGEST = 2048
_SAMPLE_FEWEST = 4096
# The mean colour of CLIP's training images: 0 after normalisation, as padding is.
FILL = (123, 117, 104)


def load_rasterio() -> ModuleType:
    """rasterio; raise :class:`ReclipError` that names the extra if it is not installed."""
    try:
        module = importlib.import_module("rasterio")
    except ImportError as error:
        raise ReclipError("rasterio, which reads GeoTIFFs, is not installed: pip install 'reclip_d2[geo]'") from error
    # GDAL's errors are raised, too, with the file's name.
    logging.getLogger("rasterio").addHandler(logging.NullHandler())
    return module


@contextlib.contextmanager
def gdal(**options: str) -> Iterator[ModuleType]:
    """rasterio, with bounded memory for decoded blocks, and without its warnings about files without a georeference.

    Args:
        options: further ones of GDAL's.
    """
    rasterio = load_rasterio()
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MIB, **options), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield rasterio


@dataclasses.dataclass(frozen=True)
class SceneStretch:
    """The stretch of a GeoTIFF.

    Attributes:
        limits: of each chosen band.
        sampled: what they were found in, in words.
    """

    limits: tuple[Limits, ...]
    sampled: str


@dataclasses.dataclass(frozen=True)
class SceneReading:
    """``INPUT.GEO``: how GeoTIFFs become RGB.

    Attributes:
        bands: numbers of the bands for red, green and blue, from 1; one for grey; empty for the file's own: its red,
            green and blue, or the first three, or the first.
        stretch, percentiles: see :func:`~reclip_d2.data.stretch.limits_of`.
        known: stretches that were found before, by the file's path.
    """

    bands: tuple[int, ...] = ()
    stretch: str = "auto"
    percentiles: tuple[float, float] = (2.0, 98.0)
    known: Mapping[str, SceneStretch] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SceneReading:
        """From the keys ``INPUT.GEO``."""
        keys = cfg.INPUT.GEO
        return cls(tuple(keys.BANDS), keys.STRETCH, tuple(keys.PERCENTILES))


class Scene:
    """An open GeoTIFF.

    Attributes:
        dataset: rasterio's.
        bands: one or three numbers of bands, from 1.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 (rasterio is optional)
        name: str,
        reading: SceneReading,
        stretch: SceneStretch | None = None,
    ) -> None:
        """Use :func:`open_scene`."""
        self.dataset, self.name, self._reading, self._known = dataset, name, reading, stretch
        self.bands = _chosen_bands(dataset, name, reading.bands)
        kinds = {dataset.dtypes[band - 1] for band in self.bands}
        if any(kind.startswith("complex") for kind in kinds):
            raise ReclipError(f"{name} holds complex numbers: convert it to real ones")
        flags = [dataset.mask_flag_enums[band - 1] for band in self.bands]
        all_valid = type(flags[0][0]).all_valid
        self._masked = any(all_valid not in flag for flag in flags)
        self._float = any(kind.startswith("float") for kind in kinds)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.dataset.height, self.dataset.width, 3

    def window(self, rows: slice, columns: slice) -> np.ndarray | None:
        """RGB pixels ``(rows, columns, 3)`` uint8 of a window, without data in :data:`FILL`; None if no pixel has data.

        Raises:
            ReclipError: the file is damaged.
        """
        return self.window_and_share(rows, columns)[0]

    def window_and_share(self, rows: slice, columns: slice) -> tuple[np.ndarray | None, float]:
        """:meth:`window`, and the share of its pixels with data."""
        values, valid = self._read(rows, columns)
        return self._rgb(values, valid), 1.0 if valid is None else float(valid.mean())

    def _rgb(self, values: np.ndarray, valid: np.ndarray | None) -> np.ndarray | None:
        """:meth:`window` from :meth:`_read`."""
        if valid is not None and not valid.any():
            return None
        if self._palette is not None:
            pixels = self._palette[values[0].clip(0, len(self._palette) - 1)]
        else:
            planes = [limits.to_8bit(plane) for limits, plane in zip(self.limits, values, strict=True)]
            pixels = np.stack(planes if len(planes) == 3 else planes * 3, axis=-1)
        if valid is not None and not valid.all():
            pixels[~valid] = FILL
        return pixels

    def valid(self, rows: slice, columns: slice) -> np.ndarray | None:
        """Whether each pixel ``(rows, columns)`` of a window has data; None if all pixels of the file have.

        A pixel has none if all chosen bands are nodata, by the file's nodata value, mask or alpha band, or if one is
        not a finite number.
        """
        if not self._masked and not self._float:
            return None
        return self._read(rows, columns)[1]

    def _read(self, rows: slice, columns: slice, **options: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Values ``(B, h, w)`` of a window, and whether its pixels have data ``(h, w)``."""
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        valid = None
        with _naming(self.name):
            values = self.dataset.read(list(self.bands), window=window, **options)
            if self._masked:
                valid = self.dataset.read_masks(list(self.bands), window=window, **options).any(0)
        if self._float:
            finite = np.isfinite(values).all(0)
            valid = finite if valid is None else valid & finite
        return values, valid

    @functools.cached_property
    def _palette(self) -> np.ndarray | None:
        """Colours ``(ids, 3)`` uint8 of a file of palette indices, unless bands were asked for."""
        interp = self.dataset.colorinterp[self.bands[0] - 1]
        if self._reading.bands or interp.name != "palette":
            return None
        colors = self.dataset.colormap(self.bands[0])
        table = np.zeros((max(colors) + 1, 3), np.uint8)
        for index, color in colors.items():
            table[index] = color[:3]
        return table

    @property
    def limits(self) -> tuple[Limits, ...]:
        """The stretch of each chosen band."""
        return self.stretch.limits

    @functools.cached_property
    def stretch(self) -> SceneStretch:
        """The limits of the chosen bands, unless they were found before.

        Percentiles and extremes are those of an overview or, without one, of the whole image if it has at most 2048 x
        2048 pixels, or of 64 windows of 256 x 256 pixels spread evenly over it. Pixels without data do not count; if
        the windows have almost none with data, the whole image is read at every so many-th pixel.
        """
        if self._known is not None:
            return self._known
        dtypes = [np.dtype(self.dataset.dtypes[band - 1]) for band in self.bands]
        kinds = {dtype == np.uint8 for dtype in dtypes}
        if self._reading.stretch == "none" or (self._reading.stretch == "auto" and kinds == {True}):
            limits = tuple(limits_of(np.empty(0), dtype, "none") for dtype in dtypes)
            return SceneStretch(limits, "the range of the type")
        sample, sampled = self._sample()
        reading = self._reading
        limits = tuple(
            limits_of(values, dtype, reading.stretch, reading.percentiles)
            for values, dtype in zip(sample, dtypes, strict=True)
        )
        return SceneStretch(limits, sampled)

    def _sample(self) -> tuple[np.ndarray, str]:
        """Values ``(B, pixels)`` with data, and what was read, in words."""
        height, width, _ = self.shape
        scale = min(1, _SAMPLE_LONGEST / max(height, width))
        reduced = {"out_shape": (len(self.bands), max(1, round(height * scale)), max(1, round(width * scale)))}
        whole = [(slice(0, height), slice(0, width))]
        if height * width <= _SAMPLE_LONGEST**2:
            return self._with_data(whole), "the whole image"
        if self.dataset.overviews(self.bands[0]):
            return self._with_data(whole, **reduced), "an overview"
        starts = [_spread(side) for side in (height, width)]
        windows = [(rows, columns) for rows in starts[0] for columns in starts[1]]
        sample = self._with_data(windows)
        if sample.shape[1] >= _SAMPLE_FEWEST:
            return sample, f"{len(windows)} windows"
        return self._with_data(whole, **reduced), "a reduced image"

    def _with_data(self, windows: Sequence[tuple[slice, slice]], **options: Any) -> np.ndarray:
        """Values ``(B, pixels)`` with data in windows."""
        parts = []
        for rows, columns in windows:
            values, valid = self._read(rows, columns, **options)
            flat = values.reshape(len(values), -1)
            parts.append(flat if valid is None else flat[:, valid.ravel()])
        return np.concatenate(parts, axis=1)

    def __str__(self) -> str:
        """Bands and stretch in words."""
        bands = f"band{'s' * (len(self.bands) > 1)} {' '.join(map(str, self.bands))}"
        if self._palette is not None:
            return f"{bands} with a palette"
        parts = ", ".join(f"{limits.low:g} to {limits.high:g}" for limits in self.limits)
        return f"{bands}, stretched from {parts} ({self.stretch.sampled})"


@contextlib.contextmanager
def open_scene(path: StrPath, reading: SceneReading = SceneReading()) -> Iterator[Scene]:  # noqa: B008 (immutable)
    """Open a GeoTIFF.

    Raises:
        ReclipError: rasterio is not installed; the file cannot be read, has not the bands that were asked for, or holds
            complex numbers.
    """
    check_regular(path, "image")
    with gdal() as rasterio, open_dataset(rasterio, str(path), f"image {display_path(path)}") as dataset:
        yield Scene(dataset, f"image {display_path(path)}", reading, reading.known.get(str(path)))


@contextlib.contextmanager
def open_dataset(rasterio: ModuleType, place: str, name: str, **options: Any) -> Iterator[Any]:
    """rasterio's data set of a TIFF, in the context :func:`gdal`.

    Args:
        place: path or GDAL's name of the file.
        name: what errors call it.
        options: of :func:`rasterio.open`.
    """
    with _naming(name):
        dataset = rasterio.open(place, driver="GTiff", **options)
    with dataset:
        yield dataset


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Report rasterio's errors as a damaged file, or as a URL that cannot be reached."""
    errors = importlib.import_module("rasterio.errors").RasterioError, importlib.import_module("rasterio._err")
    try:
        yield
    except (errors[0], errors[1].CPLE_BaseError, OSError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        remedy = "check the URL and your access" if "://" in name else "replace or remove the file"
        raise ReclipError(f"{name} cannot be read ({cause}): {remedy}") from error


def _chosen_bands(dataset: Any, name: str, asked: Sequence[int]) -> tuple[int, ...]:  # noqa: ANN401
    if asked:
        if max(asked) > dataset.count:
            raise ReclipError(f"{name} has {dataset.count} bands, but band {max(asked)} was asked for")
        return tuple(asked)
    meanings = [interp.name for interp in dataset.colorinterp]
    if {"red", "green", "blue"} <= set(meanings):
        return tuple(meanings.index(color) + 1 for color in ("red", "green", "blue"))
    colors = [number for number, meaning in enumerate(meanings, start=1) if meaning != "alpha"]
    if not colors:
        raise ReclipError(f"{name} has an alpha band alone: give INPUT.GEO.BANDS")
    return tuple(colors[:3]) if len(colors) >= 3 else (colors[0],)


def _spread(side: int) -> list[slice]:
    """Windows spread evenly along a side."""
    size = min(side, _SAMPLE_SIDE)
    count = max(1, min(_SAMPLE_WINDOWS, side // size))
    starts = [round(k * (side - size) / max(count - 1, 1)) for k in range(count)]
    return [slice(start, start + size) for start in starts]
