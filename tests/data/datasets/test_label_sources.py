"""Labels as shipped, beside images with every EXIF orientation."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from reclip_d2.data.datasets.label_sources import IndexPNG, RunLengthLabel, read_upright, upright_size
from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError

HEIGHT, WIDTH = 7, 12


@pytest.fixture
def label() -> np.ndarray:
    """``(7, 12)`` as stored; no turn or flip leaves it as it is."""
    return np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)


def write_pair(folder, label: np.ndarray, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "image.jpg", exif=exif)
    Image.fromarray(label).save(folder / "label.png")
    return IndexPNG(folder / "label.png"), folder / "image.jpg"


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_label_of_the_stored_pixels_is_turned_as_the_image(tmp_path, label, orientation):
    source, image = write_pair(tmp_path, label, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(label).save(tmp_path / "rotated.png", exif=exif)
    with Image.open(tmp_path / "rotated.png") as rotated:
        expected = np.asarray(ImageOps.exif_transpose(rotated))
    upright, turned = read_upright(source, image)
    assert turned
    np.testing.assert_array_equal(upright, expected)
    assert upright_size(image) == upright.shape == read_image(image).shape[:2] == (WIDTH, HEIGHT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_label_stays(tmp_path, label, orientation):
    sideways = orientation >= 5
    source, image = write_pair(tmp_path, label.T.copy() if sideways else label, orientation)
    upright, turned = read_upright(source, image)
    assert not turned
    np.testing.assert_array_equal(upright, label.T if sideways else label)
    assert upright_size(image) == upright.shape == read_image(image).shape[:2]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_png_images_with_exif_data(tmp_path, label, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(label).save(tmp_path / "image.png", exif=exif)
    upright = read_image(tmp_path / "image.png")
    assert upright_size(tmp_path / "image.png") == upright.shape[:2]
    Image.fromarray(label).save(tmp_path / "label.png")
    if orientation in (6, 8):
        turned, done = read_upright(IndexPNG(tmp_path / "label.png"), tmp_path / "image.png")
        assert done
        np.testing.assert_array_equal(turned, upright[..., 0])


def test_a_label_too_large_to_be_true(tmp_path, label, monkeypatch):
    Image.fromarray(label).save(tmp_path / "label.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ReclipError, match=r"label .*label.png cannot be read"):
        IndexPNG(tmp_path / "label.png").read()


def test_turned_label_beside_an_upright_image(tmp_path, label):
    source, image = write_pair(tmp_path, label.T.copy(), 1)
    with pytest.raises(ReclipError, match="has size 7x12, its image .* 12x7"):
        read_upright(source, image)


def test_palette_indices_not_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.putdata([2, 1])
    image.save(tmp_path / "label.png")
    assert IndexPNG(tmp_path / "label.png").read().tolist() == [[2, 1]]


def test_run_lengths_go_down_the_columns():
    """COCO's order, on paper: 2 x 3 px, first column, then the second, and so on; the later mask covers the earlier."""
    masks = ((4, {"size": [2, 3], "counts": [1, 3, 2]}), (7, {"size": [2, 3], "counts": [3, 2, 1]}))
    assert RunLengthLabel("x", (2, 3), masks).read().tolist() == [[0, 4, 7], [4, 7, 0]]
    assert not RunLengthLabel("x", (2, 3), ()).read().any()
