"""``reclip predict scene.tif``: georeference, nodata, blending of windows, resuming, and mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data import remote_images
from tests.cli.conftest import picture, read_mask
from tests.geotiffs import write_geotiff
from tests.range_server import serving_ranges

rasterio = pytest.importorskip("rasterio")
TRANSFORM = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)


def write_scene(path: Path, values: np.ndarray, **options) -> None:
    """``(H, W, B)`` values as a GeoTIFF."""
    write_geotiff(path, values.transpose(2, 0, 1), **{"transform": TRANSFORM, **options})


def read_scene(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.fixture
def predict(reclip, segment, tmp_path):
    """Predict with MaskCLIP."""
    assert segment("--fast", output="fast").status == 0

    def run(*arguments: str, images=("scene.tif",), output: str = "out", opts: tuple[str, ...] = ()):
        call = ["predict", *images, "--model", "fast", "--output", output, "--device", "cpu", *arguments]
        return reclip(*call, *(("--opts", *opts) if opts else ()))

    return run


def test_mask_has_the_georeference_and_the_classes(predict, tmp_path):
    values = picture(0, 130, 170)
    values[:40, :50] = 0
    write_scene(tmp_path / "scene.tif", values, nodata=0)
    result = predict("--background", "keep")
    assert result.status == 0, result.err
    assert "1 masks by MaskCLIP (1 new)" in result.out and "bands 1 2 3" in result.out
    with rasterio.open(tmp_path / "out" / "masks" / "scene.tif") as file:
        assert file.crs.to_epsg() == 32633 and file.transform == TRANSFORM
        assert file.nodata == 255 and file.dtypes == ("uint8",) and file.shape == (130, 170)
        assert file.profile["tiled"] and file.compression.name == "deflate"
        names = ["sky", "wood", "fire", "background"]
        assert json.loads(file.tags()["CLASSES"]) == names
        assert [file.tags(1)[f"CLASS_{k}"] for k in range(4)] == names
        classes = json.loads((tmp_path / "out" / "masks" / "classes.json").read_text())["classes"]
        assert [list(file.colormap(1)[k][:3]) for k in range(4)] == [item["color"] for item in classes]
        labels = file.read(1)
    assert (labels[:40, :50] == 255).all() and set(np.unique(labels[40:])) <= {0, 1, 2, 3}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {item["name"]: item["pixels"] for item in summary["classes"]}["ignored"] == 40 * 50

    again = predict("--background", "keep")
    assert again.status == 0 and "(0 new)" in again.out


def test_windows_are_blended_as_the_tiles_of_a_large_image(predict, tmp_path):
    """The same pixels as a PNG above INPUT.TILES.FROM_SIDE give the same mask."""
    tiles = ("INPUT.TILES.SIZE", "64", "INPUT.TILES.FROM_SIDE", "65")
    pixels = picture(1, 150, 200)
    write_scene(tmp_path / "scene.tif", pixels)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    result = predict(images=("scene.tif", "same.png"), opts=tiles)
    assert result.status == 0 and "2 masks" in result.out
    masks = tmp_path / "out" / "masks"
    assert np.array_equal(read_scene(masks / "scene.tif"), read_mask(masks / "same.png"))
    # Scenes are in tiles from one tile on; the picture is not.
    more = predict(images=("scene.tif",), output="other", opts=("INPUT.TILES.SIZE", "64"))
    assert more.status == 0
    assert np.array_equal(read_scene(tmp_path / "other" / "masks" / "scene.tif"), read_mask(masks / "same.png"))


def test_bands_and_stretch(predict, tmp_path):
    """Sixteen bits in another order, stretched, are the picture."""
    pixels = picture(2, 96, 128)
    pixels[0, 0], pixels[0, 1] = 0, 255  # so that the extremes are known
    write_scene(tmp_path / "plain.tif", pixels)
    deep = np.dstack([np.full((96, 128), 7), pixels[..., ::-1]]).astype(np.uint16)
    deep[..., 1:] = deep[..., 1:] * 10 + 400
    write_scene(tmp_path / "scene.tif", deep)
    result = predict("--bands", "4", "3", "2", "--stretch", "minmax")
    assert result.status == 0 and "bands 4 3 2, stretched from 400 to 2950" in result.out, result.err
    assert predict(images=("plain.tif",), output="plain").status == 0
    assert np.array_equal(
        read_scene(tmp_path / "out" / "masks" / "scene.tif"), read_scene(tmp_path / "plain" / "masks" / "plain.tif")
    )
    # Other bands are another result.
    assert "was made with" in predict("--bands", "1").error


def test_a_folder_of_both_kinds(predict, tmp_path, photos):
    write_scene(photos / "in" / "scene.tiff", picture(3))
    Image.fromarray(picture(4)).save(photos / "plain.tif")
    result = predict(images=("photos",))
    assert result.status == 0, result.err
    masks = {str(path.relative_to(tmp_path / "out" / "masks")) for path in (tmp_path / "out" / "masks").rglob("*.*")}
    assert {"in/scene.tif", "plain.png", "0.png", "in/4.png"} <= masks and "8 masks" in result.out
    (tmp_path / "out" / "masks" / ".coverage.jsonl").unlink()  # is counted again
    before = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert predict(images=("photos",)).status == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["classes"] == before["classes"]


def test_shards(predict, tmp_path):
    write_scene(tmp_path / "scene.tif", picture(0))
    write_scene(tmp_path / "two.tif", picture(1))
    images = ("scene.tif", "two.tif")
    for shard in ("1/2", "2/2"):
        assert predict("--shard", shard, images=images).status == 0
    assert predict(images=images, output="whole").status == 0
    for name in images:
        one, other = (read_scene(tmp_path / folder / "masks" / name) for folder in ("out", "whole"))
        assert np.array_equal(one, other)
    assert "2 masks" in predict(images=images).out


def test_a_broken_scene_leaves_nothing_and_the_others_are_made(predict, tmp_path):
    write_scene(tmp_path / "scene.tif", picture(0, 300, 300))
    write_scene(tmp_path / "broken.tif", picture(1, 300, 300))
    data = (tmp_path / "broken.tif").read_bytes()
    (tmp_path / "broken.tif").write_bytes(data[: len(data) // 2])
    result = predict(images=("scene.tif", "broken.tif"))
    assert "1 of 2 images have no mask" in result.error
    assert "no mask of broken: image" in result.out and "broken.tif cannot be read" in result.out
    masks = tmp_path / "out" / "masks"
    assert [path.name for path in masks.glob("*.tif")] == ["scene.tif"] and not list(masks.glob(".*.tmp*"))


def test_other_scenes(predict, tmp_path):
    """Turned, without a CRS, in strips, one band, smaller than a window, with alpha, without data."""
    pixels = picture(6, 70, 90)
    turned = rasterio.Affine(8.66, 5, 5e5, 5, -8.66, 5e6)
    write_scene(tmp_path / "turned.tif", pixels, transform=turned, blockysize=1)
    write_scene(tmp_path / "plain.tif", pixels, crs=None)
    write_scene(tmp_path / "grey.tif", pixels[..., :1])
    write_scene(tmp_path / "small.tif", pixels[:9, :11])
    alpha = np.full((70, 90, 1), 255, np.uint8)
    alpha[:, 60:] = 0
    colors = ("red", "green", "blue", "alpha")
    write_scene(tmp_path / "alpha.tif", np.concatenate([pixels, alpha], axis=2), colors=colors)
    floats = np.full((70, 90, 1), np.nan, np.float32)
    write_scene(tmp_path / "empty.tif", floats, nodata=np.nan)
    names = ("turned", "plain", "grey", "small", "alpha", "empty")
    result = predict("--background", "keep", images=[f"{name}.tif" for name in names])
    assert result.status == 0, result.err
    masks = tmp_path / "out" / "masks"
    for name in names:
        with rasterio.open(tmp_path / f"{name}.tif") as image, rasterio.open(masks / f"{name}.tif") as file:
            assert (file.shape, file.transform, file.crs) == (image.shape, image.transform, image.crs)
    assert read_scene(masks / "small.tif").max() < 4 and (read_scene(masks / "empty.tif") == 255).all()
    assert np.array_equal(read_scene(masks / "turned.tif"), read_scene(masks / "plain.tif"))
    found = read_scene(masks / "alpha.tif")
    assert (found[:, 60:] == 255).all() and found[:, :60].max() < 4
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    write_scene(tmp_path / "same.tif", grey)
    assert predict("--background", "keep", images=("same.tif",), output="same").status == 0
    assert np.array_equal(read_scene(tmp_path / "same" / "masks" / "same.tif"), read_scene(masks / "grey.tif"))


def test_at_urls(predict, tmp_path, monkeypatch):
    """The mask of the file, from parts of it; and what cannot be reached."""
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote_images, "_WAIT", 0.01)
    noise = np.random.default_rng(0).integers(1, 256, (3, 600, 600), dtype=np.uint8)
    noise[:, 200:] = 0
    options = {"nodata": 0, "driver": "COG", "blocksize": 128, "compress": "none", "overviews": "none"}
    write_geotiff(tmp_path / "scene.tif", noise, **options)
    data = (tmp_path / "scene.tif").read_bytes()
    tiles = ("INPUT.TILES.SIZE", "256")
    assert predict(output="local", opts=tiles).status == 0
    with serving_ranges() as server:
        server.files["scenes/scene.tif"] = data
        urls = [f"{server.address}/scenes/scene.tif", f"{server.address}/scenes/gone.tif"]
        result = predict(images=urls, opts=tiles)
        assert "1 of 2 images have no mask" in result.error
        assert "no mask of gone: image http" in result.out and "gone.tif does not exist: check the URL" in result.out
        mask = (tmp_path / "out" / "masks" / "scene.tif").read_bytes()
        assert mask == (tmp_path / "local" / "masks" / "scene.tif").read_bytes()
        assert not (tmp_path / "out" / "run" / "copies").exists()
        again = predict("--skip-broken", images=urls, opts=tiles)
        assert again.status == 0 and "1 masks by MaskCLIP (0 new)" in again.out

        server.ranges = False
        whole = predict(images=urls[:1], output="whole", opts=tiles)
        assert whole.status == 0 and "is copied as a whole, since its server does not send parts of files" in whole.out
        assert (tmp_path / "whole" / "masks" / "scene.tif").read_bytes() == mask
        assert not (tmp_path / "whole" / "run" / "copies").exists()
    closed = predict(images=urls[:1], output="closed")
    assert "1 of 1 images have no mask" in closed.error and "check the URL and your access" in closed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bands", "1", "2"), "--bands is [1, 2]; name three bands"),
        (("--bands", "0"), "--bands is [0]; it must be a list"),
        (("--bands", "9"), "1 of 1 images have no mask"),
        (("--stretch", "98", "2"), "--stretch 98 2: give two percentiles"),
        (("--stretch", "2"), "--stretch 2: give two percentiles"),
        (("--stretch", "nan", "5"), "--stretch nan 5: give two percentiles"),
        (("--stretch", "linear"), "--stretch linear: give two percentiles"),
        (("--formats", "coco"), "--formats coco: scene.tif is a GeoTIFF, whose mask is a GeoTIFF alone"),
    ],
)
def test_mistakes(predict, tmp_path, arguments, words):
    write_scene(tmp_path / "scene.tif", picture(0))
    assert words in predict(*arguments).error


def test_bands_of_photographs(predict, photos):
    assert "--bands and --stretch are for GeoTIFFs" in predict("--bands", "1", images=("photos",)).error


def test_without_rasterio(predict, tmp_path, monkeypatch):
    write_scene(tmp_path / "scene.tif", picture(0))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert "not installed: pip install 'reclip_d2[geo]'" in predict().error
    assert not (tmp_path / "out" / "masks").exists()


@pytest.mark.slow
def test_memory_of_a_large_scene(predict, tmp_path):
    """12,000 x 12,000 pixels in four bands of 16 bits, 1.1 GB: memory beyond that of a scene of one tile.

    Whole, its RGB pixels alone have 412 MiB. Of what grows, everything grows with the width alone (see the module's
    text): measured here for 12,000, a scene of 50,000 columns needs at most 50/12 of it.
    """
    limit = {}
    for name, side in (("small", 1024), ("large", 12_000)):
        path = tmp_path / f"{name}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", height=side, width=side, count=4, dtype="uint16", nodata=0, tiled=True,
            compress="deflate", crs="EPSG:32633", transform=TRANSFORM, sparse_ok=True, bigtiff="IF_SAFER",
        ) as file:  # fmt: skip
            tile = (picture(5, 1024, 1024).astype(np.uint16) * 20 + 100)[..., [0, 1, 2, 0]].transpose(2, 0, 1)
            for left in range(0, side - 1023, 1024):  # a row, a column, and the rest without data
                file.write(tile, window=((side - 1024, side), (left, left + 1024)))
                file.write(tile, window=((left, left + 1024), (0, 1024)))
        program = "import resource, sys; from reclip_d2.cli.main import main\n"
        program += "try: main(sys.argv[1:])\nfinally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        call = ["predict", path, "--model", tmp_path / "fast", "--output", tmp_path / name, "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, call)], capture_output=True, text=True, check=True
        )
        limit[name] = int(done.stdout.split("peak ")[1]) / 1024
        with rasterio.open(tmp_path / name / "masks" / f"{name}.tif") as file:
            assert file.shape == (side, side) and (file.read(1, window=((1024, 2048), (1024, 2048))) == 255).all()
    assert limit["large"] - limit["small"] < 700, limit
