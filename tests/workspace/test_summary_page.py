"""The page with the summary of a run."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.image_folder import find_images
from reclip_d2.data.scene_files import mark_scenes
from reclip_d2.formats import IndexWriter, MaskClasses, Prediction
from reclip_d2.workspace import summary_page as module
from reclip_d2.workspace.decision import Decision
from reclip_d2.workspace.run_folder import RunFolder
from reclip_d2.workspace.run_result import ClassShare, RunResult
from reclip_d2.workspace.summary_page import PICTURES, summary_page
from tests.cli.conftest import picture
from tests.geotiffs import write_geotiff

CLASSES = MaskClasses(("sky", "<b>fire</b>"), ((255, 0, 0), (0, 0, 255)))


@pytest.fixture
def page(tmp_path):
    """Writes 14 images and masks of two kinds, and returns the page."""
    for number in range(14):
        Image.fromarray(picture(number, 60, 40)).save(tmp_path / f"{number:02}.png")
    images = find_images([tmp_path]).images
    folders = {kind: tmp_path / "out" / kind for kind in ("rectified", "maskclip")}
    for label, folder in enumerate(folders.values()):
        writer = IndexWriter(folder, CLASSES)
        for image in images:
            writer.add(Prediction(image.name, np.full((60, 40), label, np.uint8)))

    def make(decision):
        shares = (ClassShare(0, "sky", 75, 14), ClassShare(1, "<b>fire</b>", 25, 7), ClassShare(255, "ignored", 0, 0))
        result = RunResult(
            RunFolder(tmp_path / "out"), "rectified", 15, 14, 14, shares, {"bad": "<cut>"}, (), decision=decision
        )
        kinds = folders if decision else {"rectified": folders["rectified"]}
        return summary_page(result, images, CLASSES, kinds)

    return make


def test_both_class_shares_and_the_reason(page):
    decision = Decision(
        "best", "rectified", "rectified", "kept the masks of it: <more>", "look at it",
        {"maskclip": 0.25, "rectified": 0.5},
        {"maskclip": {"0": 30, "1": 60, "255": 10}, "rectified": {"0": 75, "1": 25}},
    )  # fmt: skip
    text = page(decision)
    assert "Kept the masks of it: &lt;more&gt;." in text and "look at it" in text
    rows = re.findall(r"<tr><td>.*?</tr>", text, re.S)
    numbers = [re.findall(r"<td class=number>([^<]*)<", row) for row in rows]
    assert numbers == [["75.0 %", "30.0 %", "14"], ["25.0 %", "60.0 %", "7"], ["0.0 %", "10.0 %", "0"]]
    assert "<b>fire" not in text and "<cut>" not in text and "&lt;cut&gt;" in text
    assert "<script" not in text and "http" not in text


def test_some_pictures(page):
    """Evenly spread; the image itself, then the kept masks, then those that they are compared with."""
    text = page(Decision("rectified", "rectified", "rectified", "why", pixels={"maskclip": {"0": 1}}))
    pictures = re.findall(r'base64,([^"]+)" alt="([^"]+)"', text)
    assert len(pictures) == 3 * PICTURES
    names = [name for _, name in pictures[::3]]
    assert names[0] == "00.png" and names == sorted(set(names))
    image, kept, other = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, _ in pictures[:3])
    assert image.shape == kept.shape == (60, 40, 3)
    # 40 % picture, 60 % the colour of class 0 or 1: red or blue.
    assert kept[..., 0].mean() > kept[..., 2].mean() + 100 and other[..., 2].mean() > other[..., 0].mean() + 100


def test_without_training(page):
    text = page(None)
    assert "Kept" not in text and "14 masks by ReCLIP++, rectified" in text
    assert len(re.findall("base64,", text)) == 2 * PICTURES


def test_the_middle_of_a_geotiff(tmp_path, monkeypatch):
    """White in the middle, with the label 1 = blue there."""
    pytest.importorskip("rasterio")
    monkeypatch.setattr(module, "_SCENE_SIDE", 16)
    values, labels = np.zeros((3, 40, 60), np.uint8), np.zeros((1, 40, 60), np.uint8)
    values[:, 12:28, 22:38], labels[:, 12:28, 22:38] = 255, 1
    write_geotiff(tmp_path / "a.tif", values)
    (tmp_path / "out" / "masks").mkdir(parents=True)
    write_geotiff(tmp_path / "out" / "masks" / "a.tif", labels)
    images = mark_scenes(find_images([tmp_path / "a.tif"])).images
    result = RunResult(RunFolder(tmp_path / "out"), "rectified", 1, 1, 1, (ClassShare(0, "sky", 1, 1),), {}, ())
    text = summary_page(result, images, CLASSES, {"rectified": tmp_path / "out" / "masks"})
    first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    )
    assert first.shape == second.shape == (16, 16, 3)
    assert first.min() > 250 and np.abs(second.astype(int) - (102, 102, 255)).max() < 8
