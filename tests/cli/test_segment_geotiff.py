"""``reclip segment`` on GeoTIFFs: training on windows, masks with the scene's georeference, and resuming."""

import json
import shutil

import numpy as np
import pytest

from reclip_d2.data.geotiff import Scene
from reclip_d2.workspace import segment as segment_module
from reclip_d2.workspace import training
from reclip_d2.workspace.options import SegmentOptions
from reclip_d2.workspace.segment import SegmentRun
from tests.cli.conftest import all_files, picture, read_mask
from tests.geotiffs import write_geotiff

rasterio = pytest.importorskip("rasterio")
TURNED = rasterio.Affine(8.66, 5, 5e5, 5, -8.66, 5e6)
# Windows of 64 pixels, at most three of a scene.
KEYS = ("INPUT.TILES.SIZE", "64", "INPUT.GEO.WINDOWS.PER_SCENE", "3")


@pytest.fixture
def scenes(tmp_path):
    """``scenes``: GeoTIFFs of 16 bits with a corner without data, one smaller than a window, one without any data."""
    folder = tmp_path / "scenes"
    folder.mkdir()

    def write(name, seed, height, width, scale=10, **options):
        values = picture(seed, height, width).transpose(2, 0, 1).astype(np.uint16) * scale + 300
        values[:, : height // 4, : width // 4] = 0
        write_geotiff(folder / name, values, nodata=0, **options)

    write("a.tif", 0, 150, 130, transform=TURNED, tiled=True, blockxsize=64, blockysize=64)
    write("b.tif", 1, 130, 90, scale=4, crs=None)
    write("small.tif", 2, 50, 60)
    write_geotiff(folder / "empty.tif", np.zeros((3, 70, 80), np.uint16), nodata=0)
    return folder


def mask(path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def test_training_on_windows(segment, reclip, scenes, tmp_path, monkeypatch):
    registered = []
    register = training.register_images
    monkeypatch.setattr(
        training, "register_images", lambda records, names: registered.append(records) or register(records, names)
    )
    result = segment(images=("scenes",), keys=KEYS)
    assert result.status == 0, result.err
    assert "4 masks by ReCLIP++, rectified (4 new)" in result.out
    assert "7 training files: tiles of very large images, and windows of GeoTIFFs" in result.out
    assert "stretched from" in result.out and "estimate: about" in result.out
    # Three windows of each large scene, the small one, and none of the empty one.
    names = [record["image_id"] for record in registered[0]]
    assert names == [*(f"{name}.tif/{k}" for name in "ab" for k in range(3)), "small.tif"]
    hypotheses = (tmp_path / "out" / "run" / "hypotheses.jsonl").read_text().splitlines()
    assert {json.loads(line)["image_id"] for line in hypotheses[1:]} == set(names)

    masks = tmp_path / "out" / "masks"
    for name in ("a", "b", "small", "empty"):
        with rasterio.open(scenes / f"{name}.tif") as image, rasterio.open(masks / f"{name}.tif") as file:
            assert file.transform == image.transform and file.crs == image.crs and file.shape == image.shape
            valid = image.read(1) > 0
            # Background names are ignored, too.
            assert (file.read(1)[~valid] == 255).all() and (not valid.any() or (file.read(1)[valid] != 255).any())
    with rasterio.open(masks / "a.tif") as file:
        assert file.transform == TURNED
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(item["pixels"] for item in summary["classes"]) == 150 * 130 + 130 * 90 + 50 * 60 + 70 * 80
    page = (tmp_path / "out" / "summary.html").read_text()
    assert page.count("data:image/jpeg") == 9  # of three scenes with data: the image, and masks of two kinds

    # The same windows and masks again, and those of predict, which finds the same stretch.
    before = all_files(tmp_path / "out" / "masks")
    again = segment(images=("scenes",), keys=KEYS)
    assert again.status == 0 and "(0 new)" in again.out and all_files(tmp_path / "out" / "masks") == before
    assert reclip("predict", "scenes", "--model", "out", "--output", "more", "--device", "cpu").status == 0
    for name in ("a", "b", "small", "empty"):
        assert np.array_equal(mask(tmp_path / "more" / "masks" / f"{name}.tif"), mask(masks / f"{name}.tif"))

    changed = segment(images=("scenes",), keys=(*KEYS, "INPUT.GEO.WINDOWS.SEED", "1"))
    assert "was made with INPUT.GEO.WINDOWS.SEED 0 instead of 1" in changed.error


def test_an_interrupted_run_ends_with_the_same_masks(segment, scenes, tmp_path, monkeypatch):
    assert segment(images=("scenes",), keys=KEYS, output="whole").status == 0

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", killed)
        segment(images=("scenes",), keys=KEYS)
    windows = all_files(tmp_path / "out" / "run" / "working")
    assert len(windows) == 7
    # Stretches were found by the first run.
    monkeypatch.setattr(Scene, "_sample", killed)
    result = segment(images=("scenes",), keys=KEYS)
    assert result.status == 0, result.err
    assert all_files(tmp_path / "out" / "masks") == all_files(tmp_path / "whole" / "masks")
    assert all_files(tmp_path / "out" / "run" / "working") == windows


def test_with_photographs_and_without_training(segment, scenes, photos, tmp_path):
    shutil.copy(scenes / "a.tif", photos / "in" / "a.tif")
    result = segment("--fast")
    assert result.status == 0 and "7 masks by MaskCLIP" in result.out, result.err
    assert read_mask(tmp_path / "out" / "masks" / "0.png").shape == (96, 96)
    assert mask(tmp_path / "out" / "masks" / "in" / "a.tif").shape == (150, 130)


def test_at_urls_they_are_copied(segment, scenes, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("a.tif", "b.tif"):
        memory.pipe(f"/scenes/{name}", (scenes / name).read_bytes())
    try:
        result = segment("--iterations", "2", images=("memory://scenes",), keys=KEYS, output="remote")
    finally:
        memory.rm("/scenes", recursive=True)
    assert result.status == 0 and "6 training files" in result.out, result.err
    copies = tmp_path / "remote" / "run" / "copies"
    assert sorted(path.name for path in copies.rglob("*.tif")) == ["a.tif", "b.tif"]
    with rasterio.open(tmp_path / "remote" / "masks" / "a.tif") as file:
        assert file.transform == TURNED and file.shape == (150, 130)


def test_as_pictures(segment, tmp_path):
    """INPUT.GEO.ENABLED False reads GeoTIFFs as other TIFFs, so that all formats can be written."""
    (tmp_path / "scenes").mkdir()
    write_geotiff(tmp_path / "scenes" / "a.tif", picture(0).transpose(2, 0, 1))
    call = ("--fast", "--formats", "overlay")
    refused = segment(*call, images=("scenes",))
    assert "a.tif is a GeoTIFF, whose mask is a GeoTIFF alone" in refused.error
    assert "INPUT.GEO.ENABLED False" in refused.error
    result = segment(*call, images=("scenes",), keys=("INPUT.GEO.ENABLED", "False"))
    assert result.status == 0, result.err
    assert read_mask(tmp_path / "out" / "masks" / "a.png").shape == (96, 96)
    assert (tmp_path / "out" / "overlay" / "a.jpg").exists()


def test_bands_and_stretch(segment, reclip, scenes, tmp_path):
    result = segment("--fast", "--bands", "3", "2", "1", "--stretch", "minmax", images=("scenes/a.tif",))
    assert result.status == 0 and "bands 3 2 1, stretched from 3" in result.out, result.err
    with rasterio.open(tmp_path / "out" / "masks" / "a.tif") as file:
        assert file.tags()["BANDS"].startswith("bands 3 2 1")
    # A model keeps how its images were read.
    predicted = reclip("predict", "scenes/b.tif", "--model", "out", "--output", "more", "--device", "cpu")
    assert "bands 3 2 1" in predicted.out
    assert "--bands is [1, 2]" in segment("--fast", "--bands", "1", "2", images=("scenes",), output="x").error
    assert "IMAGES names none" in segment("--fast", "--bands", "1", output="x").error


def test_a_bank_is_made_from_windows(segment, scenes, tmp_path, monkeypatch):
    """And an engine that makes the masks of pictures leaves GeoTIFFs to this process."""
    monkeypatch.setattr(segment_module, "engine_of", lambda *arguments: "an engine")
    monkeypatch.setattr(segment_module, "masks_on_ray", lambda engine, folder, model: lambda request, images, stage: {})
    monkeypatch.setattr(training, "make_parts", lambda engine, cfg: None)
    assert segment("--bank", images=("scenes",), keys=KEYS).status == 0
    assert (tmp_path / "out" / "run" / "rectified" / "bank.safetensors").exists()
    for folder in ("masks", "previous-maskclip-ignore/masks"):
        assert len(list((tmp_path / "out" / folder).glob("*.tif"))) == 4
    refused = segment("--bank", "--fast", images=("scenes",), output="fast")
    assert "--fast and --bank: a bank is made from the training's windows of GeoTIFFs" in refused.error


def test_nothing_to_train_on(segment, scenes):
    assert "first problem: no GeoTIFF has a pixel with data" in segment(images=("scenes/empty.tif",)).error


def test_iterations_grow_with_the_windows(scenes, classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segment_module, "suggested_iterations", lambda images, cfg: images)

    def iterations(*opts):
        options = SegmentOptions(clip="reclip-embedded", device="cpu", opts=opts)
        return SegmentRun("scenes", "classes.txt", "new", options).configs["rectified"].SOLVER.MAX_ITER

    assert iterations(*KEYS) == 3 + 3 + 1 + 3  # the empty one has places for four
    assert iterations("INPUT.TILES.SIZE", "128") == 4 + 2 + 1 + 1
