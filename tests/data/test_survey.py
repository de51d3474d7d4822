"""The survey of a user's images: broken files, signatures, working files, and resuming."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data import survey
from reclip_d2.data.geotiff import SceneReading, SceneStretch
from reclip_d2.data.image_folder import ImageFile, find_images
from reclip_d2.data.scene_files import mark_scenes
from reclip_d2.data.scene_windows import WindowPlan
from reclip_d2.data.stretch import Limits
from reclip_d2.data.survey import survey_images
from reclip_d2.data.tiling import Tiling
from reclip_d2.data.working_files import WorkingFiles
from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import file_digest
from tests.geotiffs import write_geotiff

WINDOWS = WindowPlan(size=64, stride=64, most=3, min_valid=0.5, seed=0)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of colour, which JPEG keeps well."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "in").mkdir(parents=True)
    Image.fromarray(picture(16, 24)).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(16, 24)).save(folder / "in" / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.fromarray(picture(1, 120)).save(folder / "thin.png")
    return folder


@pytest.fixture
def look(tmp_path, photos):
    """Survey the folder; returns the images by id."""
    files = WorkingFiles(tmp_path / "work", Tiling(200, 64, 0.25), 40 * 40, 32, SceneReading(), WINDOWS)

    def run() -> dict[str, survey.SurveyedImage]:
        images = find_images([photos]).images
        signatures = {image.image_id: file_digest(image.path) for image in images}
        found = survey_images(images, signatures, tmp_path / "record.jsonl", files, threads=2)
        assert [image.file for image in found] == images
        return {image.file.image_id: image for image in found}

    return run


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that are decoded."""
    names: list[str] = []
    read_image = survey.read_image

    def reading(path: object) -> np.ndarray:
        names.append(os.path.basename(path))
        return read_image(path)

    monkeypatch.setattr(survey, "read_image", reading)
    return names


def test_sizes_and_problems(look, photos):
    images = look()
    assert images["a"].size == (16, 24) and images["a"].problem == ""
    assert images["a"].training_files == (photos / "a.png",)
    assert images["in/turned"].size == (24, 16)  # upright
    assert "broken.jpg cannot be read" in images["broken"].problem and images["broken"].size == (0, 0)
    assert "120 x 1 pixels, with one side more than 100 times" in images["thin"].problem


def test_what_is_known_is_not_looked_at_again(look, photos, decoded):
    first = look()
    assert len(decoded) == 4
    decoded.clear()
    assert look() == first
    assert decoded == []
    os.utime(photos / "a.png", (0, 0))  # touched only
    look()
    assert decoded == []
    Image.fromarray(picture(8, 8)).save(photos / "a.png")
    Image.fromarray(picture(8, 9)).save(photos / "new.png")
    assert look()["a"].size == (8, 8)
    assert sorted(decoded) == ["a.png", "new.png"]


def test_a_line_that_a_kill_has_cut_short(look, tmp_path, decoded):
    first = look()
    record = tmp_path / "record.jsonl"
    whole = record.read_text()
    for cut in (1, 10, 60):
        record.write_text(whole[:-cut])
        decoded.clear()
        assert look() == first
        assert len(decoded) == 1
        decoded.clear()
        assert look() == first and decoded == []


@pytest.mark.parametrize(
    "change",
    [
        {"size": [1]}, {"size": "16"}, {"size": [-1, 4]}, {"problem": None}, {"working": 3}, {"working": [None]},
        {"working": ["../secret.jpg"]}, {"working": ["/etc/secret.jpg"]}, {"working": ["in/../../secret.jpg"]},
        {"image_id": ["a"]}, {"image_id": None}, {"signature": {}},
    ],
)  # fmt: skip
def test_lines_of_another_shape_are_made_again(look, tmp_path, decoded, change):
    first = look()
    (tmp_path / "secret.jpg").write_bytes(b"not of this run")
    record = tmp_path / "record.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines() if line]
    lines = [{**line, **change} if line["image_id"] == "a" else line for line in lines]
    record.write_text("\n".join([*map(json.dumps, lines), "[" * 100_000, "\udcff\0"]), errors="surrogateescape")
    decoded.clear()
    assert look() == first and decoded == ["a.png"]


def test_a_large_image_has_a_smaller_copy(look, photos, tmp_path, decoded):
    large = picture(48, 96)
    Image.fromarray(large).save(photos / "in" / "large.png")
    image = look()["in/large"]
    assert image.size == (48, 96) and image.training_files == (tmp_path / "work" / "in" / "large.jpg",)
    copy = np.asarray(Image.open(image.training_files[0]))
    assert copy.shape == (32, 64, 3)
    expected = np.asarray(Image.fromarray(large).resize((64, 32), Image.Resampling.BOX))
    assert np.abs(copy.astype(int) - expected).mean() < 3
    decoded.clear()
    image.training_files[0].unlink()  # missing files are made again
    assert look()["in/large"] == image and decoded == ["large.png"]
    assert image.training_files[0].exists()


def test_other_working_files_are_made_anew(look, photos, tmp_path, decoded):
    Image.fromarray(picture(100, 208)).save(photos / "scan.png")
    look()
    images = find_images([photos]).images
    signatures = {image.image_id: file_digest(image.path) for image in images}
    files = WorkingFiles(tmp_path / "work", Tiling(200, 100, 0.25), 40 * 40, 32, SceneReading(), WINDOWS)
    found = survey_images(images, signatures, tmp_path / "record.jsonl", files)
    assert [len(image.training_files) for image in found if image.file.image_id == "scan"] == [3]


def test_a_thin_large_image_is_not_enlarged(look, photos):
    Image.fromarray(picture(20, 190)).save(photos / "wide.png")  # more pixels than copy_from, but a low side
    assert look()["wide"].training_files == (photos / "wide.png",)


def test_a_very_large_image_is_cut_into_tiles(look, photos, tmp_path):
    large = picture(100, 208, seed=1)
    Image.fromarray(large).save(photos / "in" / "scan.png")
    image = look()["in/scan"]
    folder = tmp_path / "work" / "in" / "scan.tiles"
    names = [f"{top:06d}_{left:06d}.jpg" for top in (0, 36) for left in (0, 64, 128, 144)]
    assert image.training_files == tuple(folder / name for name in names)
    for name in names:
        top, left = int(name[:6]), int(name[7:13])
        tile = np.asarray(Image.open(folder / name)).astype(int)
        assert tile.shape == (64, 64, 3)
        assert np.abs(tile - large[top : top + 64, left : left + 64]).mean() < 3
    assert {path.name for path in folder.parent.iterdir()} == {"scan.tiles"}  # nothing left over


def test_large_images_come_one_at_a_time(look, monkeypatch, decoded):
    monkeypatch.setattr(survey, "_LARGE", 16 * 24 - 1)
    assert len(look()) == 4
    assert sorted(decoded[:2]) == ["broken.jpg", "thin.png"] and decoded[2:] == ["a.png", "turned.jpg"]


def test_a_record_that_is_a_pipe_is_not_waited_for(look, tmp_path):
    os.mkfifo(tmp_path / "record.jsonl")
    with pytest.raises(ReclipError, match="record.jsonl is a named pipe, not a regular file"):
        look()


def test_a_file_that_vanishes_is_a_broken_one(tmp_path, photos):
    files = WorkingFiles(tmp_path / "work", Tiling(200, 64, 0.25), 40 * 40, 32, SceneReading(), WINDOWS)
    image = ImageFile(photos / "gone.png", find_images([photos]).images[0].name.with_name("gone.png"))
    (found,) = survey_images([image], {"gone": ""}, tmp_path / "record.jsonl", files)
    assert "gone.png does not exist" in found.problem


@pytest.fixture
def scenes(tmp_path):
    """A folder of GeoTIFFs of 16 bits, and what surveys it; gives the images by id."""
    pytest.importorskip("rasterio")
    folder = tmp_path / "scenes"
    folder.mkdir()
    values = np.broadcast_to(np.linspace(1000, 3000, 96 * 128).astype(np.uint16).reshape(1, 96, 128), (3, 96, 128))
    write_geotiff(folder / "large.tif", values.copy())
    write_geotiff(folder / "small.tif", values[:, :50, :60].copy())
    write_geotiff(folder / "empty.tif", values[:, :70, :70] * 0, nodata=0)
    write_geotiff(folder / "thin.tif", values[:1, :, :101].reshape(1, 1, -1).copy())
    (folder / "bad.tif").write_bytes((folder / "large.tif").read_bytes()[:9000])

    def run(**keys):
        reading = SceneReading(stretch=keys.pop("stretch", "minmax"))
        windows = dataclasses.replace(WINDOWS, **keys)
        files = WorkingFiles(tmp_path / "work", Tiling(200, 64, 0.25), 40 * 40, 32, reading, windows)
        images = mark_scenes(find_images([folder])).images
        digests = {image.image_id: file_digest(image.path) for image in images}
        return {i.file.image_id: i for i in survey_images(images, digests, tmp_path / "record.jsonl", files)}

    return run


def test_windows_of_geotiffs(scenes, tmp_path):
    found = scenes()
    large = found["large"]
    assert large.size == (96, 128) and not large.problem
    assert large.stretch == SceneStretch((Limits(1000, 3000),) * 3, "the whole image")
    folder = tmp_path / "work" / "large.windows"
    assert len(large.training_files) == 3 and set(large.training_files) == set(folder.iterdir())
    values = np.linspace(1000, 3000, 96 * 128).astype(np.uint16).reshape(96, 128)
    for file in large.training_files:
        top, left = int(file.name[:6]), int(file.name[7:13])
        assert top in (0, 32) and left in (0, 64)
        expected = np.rint((values[top : top + 64, left : left + 64] - 1000.0) * 255 / 2000)
        pixels = np.asarray(Image.open(file)).astype(int)
        assert pixels.shape == (64, 64, 3) and np.abs(pixels - expected[..., None]).max() <= 4  # a JPEG
    (small,) = found["small"].training_files
    assert Image.open(small).size == (60, 50)
    assert found["empty"].training_files == () and found["empty"].problem == ""
    assert [Image.open(file).size for file in found["thin"].training_files] == [(64, 1)] * 3
    assert "thin.tif has 128 x 1 pixels, with one side more than 100 times" in scenes(size=128)["thin"].problem
    assert "bad.tif cannot be read" in found["bad"].problem


def test_windows_are_made_once_for_the_same_keys(scenes, monkeypatch):
    first = scenes()
    opened = []
    open_scene = survey.open_scene
    monkeypatch.setattr(
        survey, "open_scene", lambda path, reading: opened.append(path.name) or open_scene(path, reading)
    )
    assert scenes() == first and opened == []
    assert {len(image.training_files) for image in scenes(most=4).values()} == {0, 1, 4}
    assert len(opened) == 5
    assert scenes(stretch="none")["large"].stretch.limits[0] == Limits(0, 65535)
    scenes(stretch="none")["large"].training_files[0].unlink()
    opened.clear()
    scenes(stretch="none")
    assert opened == ["large.tif"]
