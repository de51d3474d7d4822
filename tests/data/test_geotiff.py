"""GeoTIFFs: what is one, bands, nodata, stretch, overviews, and what cannot be read."""

import sys

import numpy as np
import pytest

from reclip_d2.data import geotiff as module
from reclip_d2.data.geotiff import FILL, SceneReading, SceneStretch, load_rasterio, open_scene
from reclip_d2.data.stretch import Limits
from reclip_d2.errors import ReclipError
from tests.geotiffs import write_geotiff

ALL = slice(0, None)


def test_without_rasterio(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ReclipError, match=r"not installed: pip install 'reclip_d2\[geo\]'"):
        load_rasterio()


@pytest.fixture
def write(tmp_path):
    """Writes a GeoTIFF of values ``(B, H, W)``; its path."""
    pytest.importorskip("rasterio")
    return lambda values, name="scene.tif", colors=(), **options: write_geotiff(
        tmp_path / name, values, colors=colors, **options
    )


def numbers(bands, height=6, width=8, dtype=np.uint8):
    """Band k (from 1) has the values k, k + 1, ... in its first row, and k everywhere else."""
    values = np.tile(np.arange(1, bands + 1)[:, None, None], (1, height, width))
    values[:, 0] += np.arange(width)
    return values.astype(dtype)


def pixels(path, rows=slice(0, 6), columns=slice(0, 8), **reading):
    with open_scene(path, SceneReading(**reading)) as scene:
        return scene.window(rows, columns)


def test_bands(write):
    four = write(numbers(4))
    assert pixels(four)[1, 1].tolist() == [1, 2, 3]
    assert pixels(four, bands=(4, 2, 1))[1, 1].tolist() == [4, 2, 1]
    assert pixels(four, bands=(3,))[1, 1].tolist() == [3, 3, 3]
    assert pixels(four, slice(0, 1), slice(2, 5))[0, :, 0].tolist() == [3, 4, 5]
    declared = write(numbers(4), "b.tif", ("blue", "green", "red", "undefined"), photometric="minisblack")
    assert pixels(declared)[1, 1].tolist() == [3, 2, 1]
    assert pixels(write(numbers(2), "c.tif"))[1, 1].tolist() == [1, 1, 1]
    with pytest.raises(ReclipError, match=r"scene.tif has 4 bands, but band 5 was asked for"):
        pixels(four, bands=(1, 2, 5))


def test_palette(write):
    rasterio = pytest.importorskip("rasterio")
    path = write(np.array([[[0, 1], [1, 2]]], np.uint8), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (9, 8, 7), 1: (50, 60, 70), 2: (255, 0, 1)})
    assert pixels(path, slice(0, 2), slice(0, 2))[:, 1].tolist() == [[50, 60, 70], [255, 0, 1]]


def test_nodata(write):
    """A pixel has no data if all chosen bands have the nodata value."""
    values = numbers(3) + 10
    values[:, 2:4, 1:3] = 0
    values[0, 5, 5] = 0
    path = write(values, nodata=0)
    expected = np.ones((6, 8), bool)
    expected[2:4, 1:3] = False
    with open_scene(path) as scene:
        assert (scene.valid(slice(0, 6), slice(0, 8)) == expected).all()
        found = scene.window(slice(0, 6), slice(0, 8))
        assert (found[~expected] == FILL).all() and found[5, 5].tolist() == [0, 12, 13]
        assert scene.window(slice(2, 4), slice(1, 3)) is None
        assert scene.window(slice(2, 4), slice(0, 3)).shape == (2, 3, 3)
    with open_scene(write(values, "b.tif")) as scene:
        assert scene.valid(slice(0, 6), slice(0, 8)) is None


def test_alpha_and_numbers_that_are_not_finite(write):
    values = numbers(4)
    values[3] = 255
    values[3, :, 4:] = 0
    with open_scene(write(values, colors=("red", "green", "blue", "alpha"))) as scene:
        valid = scene.valid(slice(0, 6), slice(0, 8))
        assert valid[:, :4].all() and not valid[:, 4:].any()
    floats = numbers(3, dtype=np.float32)
    floats[1, 3, 3] = np.nan
    with open_scene(write(floats, "b.tif")) as scene:
        valid = scene.valid(slice(0, 6), slice(0, 8))
        assert not valid[3, 3] and valid.sum() == 47
        assert scene.window(slice(0, 6), slice(0, 8))[3, 3].tolist() == list(FILL)


def test_stretch_of_sixteen_bits_leaves_nodata_out(write):
    values = np.tile(np.linspace(1000, 2000, 100).astype(np.uint16), (3, 10, 1))
    values[:, :5] = 0
    path = write(values, nodata=0)
    with open_scene(path, SceneReading(stretch="minmax")) as scene:
        found = scene.window(slice(0, 10), slice(0, 100))
        assert (found[:5] == FILL).all()
        assert found[5, 0].tolist() == [0] * 3 and found[5, 99].tolist() == [255] * 3
        assert [(limits.low, limits.high) for limits in scene.limits] == [(1000, 2000)] * 3
    with open_scene(path) as scene:
        low, high = np.percentile(values[0, 5:], (2, 98))
        assert (scene.limits[0].low, scene.limits[0].high) == pytest.approx((low, high))
        assert "bands 1 2 3" in str(scene) and "the whole image" in str(scene)
    with open_scene(path, SceneReading(stretch="none")) as scene:
        assert scene.window(slice(5, 6), slice(99, 100))[0, 0].tolist() == [round(2000 * 255 / 65535)] * 3


def test_sample_of_large_files_is_bounded(write, monkeypatch):
    """Without overviews windows that touch all four borders; with them the overview."""
    monkeypatch.setattr(module, "_SAMPLE_LONGEST", 64)
    monkeypatch.setattr(module, "_SAMPLE_SIDE", 8)
    monkeypatch.setattr(module, "_SAMPLE_FEWEST", 100)
    values = np.full((1, 200, 300), 500, np.uint16)
    values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1] = 100, 900, 200, 800
    plain = write(values)
    with open_scene(plain, SceneReading(stretch="minmax")) as scene:
        assert (scene.limits[0].low, scene.limits[0].high) == (100, 900) and scene.stretch.sampled == "64 windows"
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(plain, "r+") as file:
        file.build_overviews([4], rasterio.enums.Resampling.nearest)
    with open_scene(plain) as scene:
        assert scene.limits and scene.stretch.sampled == "an overview"


def test_sample_of_a_scene_with_little_data(write, monkeypatch):
    """A stripe between the windows."""
    monkeypatch.setattr(module, "_SAMPLE_LONGEST", 150)
    monkeypatch.setattr(module, "_SAMPLE_SIDE", 8)
    values = np.zeros((1, 300, 300), np.uint16)
    values[:, 15:30] = 700
    values[:, 15:30, :150] = 800
    with open_scene(write(values, nodata=0), SceneReading(stretch="minmax")) as scene:
        assert (scene.limits[0].low, scene.limits[0].high) == (700, 800) and scene.stretch.sampled == "a reduced image"


def test_cloud_optimized(write):
    values = np.tile(np.arange(1024, dtype=np.uint16), (3, 1024, 1))
    path = write(values, "cog.tif", driver="COG", blocksize=256, compress="deflate")
    found = pixels(path, slice(500, 502), slice(1000, 1024), stretch="minmax")
    assert found.shape == (2, 24, 3) and found[0, -1, 0] == 255


def test_one_band_and_floats_with_nan_as_nodata(write):
    """Percentiles are NumPy's of the pixels with data, whatever stores nodata."""
    values = np.linspace(-3, 8, 48, dtype=np.float32).reshape(1, 6, 8)
    values[0, 0, :4] = np.nan
    values[0, 5, 7] = np.inf
    data = values[0][np.isfinite(values[0])].astype(np.float64)
    low, high = np.percentile(data, (2, 98))
    expected = np.clip(np.rint((values[0].astype(np.float64) - low) * 255 / (high - low)), 0, 255)
    valid = np.isfinite(values[0])
    with open_scene(write(values, nodata=np.nan)) as scene:
        assert scene.bands == (1,)
        found, share = scene.window_and_share(slice(0, 6), slice(0, 8))
        assert share == 43 / 48 and (scene.valid(slice(0, 6), slice(0, 8)) == valid).all()
        assert (found[valid] == expected[valid][:, None]).all() and (found[~valid] == FILL).all()


def test_share_of_a_window(write):
    values = numbers(3) + 10
    values[:, :3] = 0
    with open_scene(write(values, nodata=0)) as scene:
        assert scene.window_and_share(slice(0, 4), slice(0, 8))[1] == 0.25
        assert scene.window_and_share(slice(0, 3), slice(0, 8)) == (None, 0.0)
    with open_scene(write(values, "b.tif")) as scene:
        assert scene.window_and_share(slice(0, 4), slice(0, 8))[1] == 1.0


def test_a_stretch_that_was_found_before(write):
    """It is not that of the file, whose sample is not read."""
    path = write(numbers(1, dtype=np.uint16) * 100)
    known = SceneStretch((Limits(0, 1000),), "earlier")
    with open_scene(path, SceneReading(known={str(path): known})) as scene:
        assert scene.window(slice(1, 2), slice(0, 1))[0, 0].tolist() == [26] * 3  # round(100 * 255 / 1000)
        assert str(scene) == "band 1, stretched from 0 to 1000 (earlier)"


@pytest.mark.parametrize("options", [{"tiled": True, "blockxsize": 16, "blockysize": 16}, {"blockysize": 1}])
def test_tiles_and_strips_of_all_layouts(write, options):
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    for number, interleave in enumerate(("pixel", "band")):
        path = write(values, f"{number}.tif", interleave=interleave, compress="lzw", **options)
        assert (pixels(path, slice(7, 33), slice(11, 50)) == values[:, 7:33, 11:].transpose(1, 2, 0)).all()


def test_what_cannot_be_read(write, tmp_path):
    path = write(numbers(3, 600, 600))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with open_scene(path) as scene, pytest.raises(ReclipError, match=r"scene.tif cannot be read \(.*\): replace"):
        scene.window(slice(0, 600), slice(0, 600))
    text = tmp_path / "text.tif"
    text.write_text("hello")
    with pytest.raises(ReclipError, match=r"image .*text.tif cannot be read"), open_scene(text):
        pass
    with pytest.raises(ReclipError, match="does not exist"), open_scene(tmp_path / "none.tif"):
        pass
    with (
        pytest.raises(ReclipError, match="holds complex numbers"),
        open_scene(write(numbers(1).astype(np.complex64), "c.tif")),
    ):
        pass
