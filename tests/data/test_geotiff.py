"""GeoTIFFs: what is one, bands, nodata, stretch, overviews, and what cannot be read."""

import sys

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data import geotiff as module
from reclip_d2.data.geotiff import FILL, SceneReading, is_geotiff, load_rasterio, open_scene
from reclip_d2.errors import ReclipError

ALL = slice(0, None)


def test_without_rasterio(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ReclipError, match=r"not installed: pip install 'reclip_d2\[geo\]'"):
        load_rasterio()


def test_plain_files_are_none(tmp_path):
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.tif")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    (tmp_path / "c.tif").write_bytes(b"")
    assert not any(is_geotiff(tmp_path / name) for name in ("a.tif", "a.png", "b.tif", "c.tif", "none.tif"))
    # The tag alone makes one.
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "d.tif", tiffinfo={33550: (1.0, 1.0, 0.0)})
    assert is_geotiff(tmp_path / "d.tif")


@pytest.fixture
def write(tmp_path):
    """Writes a GeoTIFF of values ``(B, H, W)``; its path."""
    rasterio = pytest.importorskip("rasterio")

    def call(values, name="scene.tif", colors=(), driver="GTiff", **options):
        path = tmp_path / name
        options = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **options}
        shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
        with rasterio.open(path, "w", driver=driver, **shape, **options) as file:
            file.write(values)
            if colors:
                file.colorinterp = [getattr(rasterio.enums.ColorInterp, name) for name in colors]
        return path

    return call


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
    assert is_geotiff(four)
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
        assert (scene.limits[0].low, scene.limits[0].high) == (100, 900) and scene.sampled == "64 windows"
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(plain, "r+") as file:
        file.build_overviews([4], rasterio.enums.Resampling.nearest)
    with open_scene(plain) as scene:
        assert scene.limits and scene.sampled == "an overview"


def test_sample_of_a_scene_with_little_data(write, monkeypatch):
    """A stripe between the windows."""
    monkeypatch.setattr(module, "_SAMPLE_LONGEST", 150)
    monkeypatch.setattr(module, "_SAMPLE_SIDE", 8)
    values = np.zeros((1, 300, 300), np.uint16)
    values[:, 15:30] = 700
    values[:, 15:30, :150] = 800
    with open_scene(write(values, nodata=0), SceneReading(stretch="minmax")) as scene:
        assert (scene.limits[0].low, scene.limits[0].high) == (700, 800) and scene.sampled == "a reduced image"


def test_cloud_optimized(write):
    values = np.tile(np.arange(1024, dtype=np.uint16), (3, 1024, 1))
    path = write(values, "cog.tif", driver="COG", blocksize=256, compress="deflate")
    assert is_geotiff(path)
    found = pixels(path, slice(500, 502), slice(1000, 1024), stretch="minmax")
    assert found.shape == (2, 24, 3) and found[0, -1, 0] == 255


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
