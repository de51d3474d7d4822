"""Labels of images with every EXIF orientation: one rule per data set."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from reclip_d2.data.datasets.label_orientation import OrientationCounts, count_orientations, label_turn, read_upright
from reclip_d2.data.datasets.label_sources import IndexPNG
from reclip_d2.data.images import read_geometry, read_image
from reclip_d2.data.orientation import Geometry
from reclip_d2.errors import ReclipError

HEIGHT, WIDTH = 7, 12


@pytest.fixture
def label() -> np.ndarray:
    """``(7, 12)`` as stored; every rotation or flip changes it."""
    return np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)


def write_pair(folder, label: np.ndarray, orientation: int, size=(WIDTH, HEIGHT)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(folder / "image.jpg", exif=exif)
    Image.fromarray(label).save(folder / "label.png")
    return IndexPNG(folder / "label.png"), folder / "image.jpg"


def transposed(label: np.ndarray, orientation: int, folder) -> np.ndarray:
    """Pillow's own idea of the label, upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(label).save(folder / "rotated.png", exif=exif)
    with Image.open(folder / "rotated.png") as rotated:
        return np.asarray(ImageOps.exif_transpose(rotated))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_label_of_the_stored_pixels_is_turned_as_the_image(tmp_path, label, orientation):
    source, image = write_pair(tmp_path, label, orientation)
    upright, turned = read_upright(source, image, read_geometry(image), "stored")
    assert turned
    np.testing.assert_array_equal(upright, transposed(label, orientation, tmp_path))
    assert upright.shape == read_image(image).shape[:2]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_square_labels_follow_the_rule(tmp_path, label, orientation):
    square = label[:, :HEIGHT].copy()
    source, image = write_pair(tmp_path, square, orientation, (HEIGHT, HEIGHT))
    geometry = read_geometry(image)
    upright, turned = read_upright(source, image, geometry, "stored")
    assert turned
    np.testing.assert_array_equal(upright, transposed(square, orientation, tmp_path))
    upright, turned = read_upright(source, image, geometry, "upright")
    assert not turned
    np.testing.assert_array_equal(upright, square)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_label_stays(tmp_path, label, orientation):
    sideways = orientation >= 5
    source, image = write_pair(tmp_path, label.T.copy() if sideways else label, orientation)
    upright, turned = read_upright(source, image, read_geometry(image), "upright")
    assert not turned
    np.testing.assert_array_equal(upright, label.T if sideways else label)


def test_turned_label_beside_an_upright_image(tmp_path, label):
    source, image = write_pair(tmp_path, label.T.copy(), 1)
    with pytest.raises(ReclipError, match="has size 7x12, its image .* 12x7"):
        read_upright(source, image, read_geometry(image), "stored")


# ---- what decides -------------------------------------------------------------------------------------------------


def counts_of(*cases: tuple[int, tuple[int, int]]) -> OrientationCounts:
    """Counts of images of 12 x 7 stored pixels: (orientation, size (H, W) of the label) each."""
    counts = OrientationCounts()
    for orientation, size in cases:
        counts.count(Geometry((HEIGHT, WIDTH), orientation), size)
    return counts


STORED, UPRIGHT, OPEN = (6, (HEIGHT, WIDTH)), (6, (WIDTH, HEIGHT)), (3, (HEIGHT, WIDTH))


def test_sizes_decide_for_those_that_do_not_tell():
    assert counts_of(STORED, OPEN).drawn_on("x", "upright", None, "") == "stored"
    assert counts_of(UPRIGHT, OPEN).drawn_on("x", "stored", None, "") == "upright"
    assert counts_of(OPEN).drawn_on("x", "stored", None, "") == "stored"
    assert counts_of(OPEN).drawn_on("x", "upright", None, "") == "upright"
    assert counts_of((1, (HEIGHT, WIDTH))).total == 0


def test_labels_of_both_kinds():
    assert counts_of(STORED, UPRIGHT).drawn_on("x", "stored", None, "") == "stored"  # nothing is left to decide
    mixed = counts_of(STORED, UPRIGHT, STORED, OPEN)
    with pytest.raises(ReclipError, match=r"^x: .* 2 are drawn on the stored .* 1 are upright, and of 1 .* do this$"):
        mixed.drawn_on("x", "stored", None, "do this")
    assert mixed.drawn_on("x", "stored", "upright", "do this") == "upright"
    assert label_turn(Geometry((HEIGHT, WIDTH), 6), (HEIGHT, WIDTH), "upright") == 6  # what the size tells, it tells


def test_the_log_line_has_the_counts():
    line = counts_of(STORED, STORED, OPEN, OPEN, OPEN).describe("stored")
    assert line.startswith("5 images have an EXIF orientation of 2 to 8") and line.endswith(
        "5 are turned with their image"
    )
    assert counts_of(UPRIGHT, OPEN).describe("upright").endswith("upright: 0 are turned with their image")


def test_only_headers_of_labels_of_turned_images_are_read(tmp_path, label):
    source, image = write_pair(tmp_path, label, 6)
    upright = tmp_path / "upright.jpg"
    Image.new("RGB", (4, 4)).save(upright)
    counts = count_orientations([(source, image), (IndexPNG(tmp_path / "none.png"), upright)])
    assert (counts.stored, counts.upright, counts.open) == (1, 0, 0)
