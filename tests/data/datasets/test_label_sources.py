"""Labels as shipped: sizes, palettes, run lengths."""

import zlib

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from reclip_d2.data.datasets.label_sources import IndexPNG, RunLengthLabel
from reclip_d2.data.datasets.voc20 import LABEL_PALETTE
from reclip_d2.errors import ReclipError


def write_palette(path, indices, table):
    image = Image.new("P", (len(indices[0]), len(indices)))
    image.putpalette([value for color in table for value in color])
    image.putdata([value for row in indices for value in row])
    image.save(path)


@pytest.mark.parametrize(("side", "message"), [(30_000, "30000 x 30000 pixels in 6. bytes"), (5_000, "5000x5000")])
def test_a_header_too_large_to_be_true(tmp_path, side, message):
    """Nothing of what is stated is decoded."""
    path = tmp_path / "label.png"
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = side.to_bytes(4) * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4)
    path.write_bytes(data)
    with pytest.raises(ReclipError, match=rf"label .*label.png has (size )?{message}"):
        IndexPNG(path).read((2, 3))


def test_colours_of_an_adaptive_palette(tmp_path):
    """VOC's colours, sorted by how often they occur: person 15, background 0, seam 255, dog 12, as drawn on paper."""
    table = [(192, 128, 128), (0, 0, 0), (224, 224, 192), (64, 0, 128)]
    write_palette(tmp_path / "label.png", [[0, 0, 1], [2, 3, 3]], table)
    source = IndexPNG(tmp_path / "label.png", LABEL_PALETTE)
    assert source.read((2, 3)).tolist() == [[15, 15, 0], [255, 12, 12]]
    assert source.is_reordered() and source.has_palette()


def test_vocs_own_palette(tmp_path):
    table = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    write_palette(tmp_path / "label.png", [[3, 0], [1, 2]], table)
    source = IndexPNG(tmp_path / "label.png", LABEL_PALETTE)
    assert source.read((2, 2)).tolist() == [[3, 0], [1, 2]]
    assert not source.is_reordered() and source.has_palette()


def test_other_palettes_are_refused(tmp_path):
    write_palette(tmp_path / "label.png", [[2, 1]], [(9, 9, 9), (200, 0, 0), (0, 200, 0)])
    with pytest.raises(ReclipError, match=r"colour \(200, 0, 0\) is not one of the data set's"):
        IndexPNG(tmp_path / "label.png", LABEL_PALETTE).read((1, 2))
    with pytest.raises(ReclipError, match=r"palette is not in the order of the ids \(its entry 1 is \(200, 0, 0\)\)"):
        IndexPNG(tmp_path / "label.png").read((1, 2))


def test_grey_labels_have_no_palette(tmp_path):
    Image.fromarray(np.array([[7, 255]], np.uint8)).save(tmp_path / "label.png")
    source = IndexPNG(tmp_path / "label.png", LABEL_PALETTE)
    assert source.read((1, 2)).tolist() == [[7, 255]]
    assert not source.is_reordered() and not source.has_palette()


# ---- run lengths ------------------------------------------------------------------------------------------------


def test_run_lengths_go_down_the_columns():
    """COCO's order, on paper: 2 x 3 px, first column, then the second, and so on; the later mask covers the earlier."""
    masks = ((4, {"size": [2, 3], "counts": [1, 3, 2]}), (7, {"size": [2, 3], "counts": [3, 2, 1]}))
    assert RunLengthLabel("x", (2, 3), masks).read((2, 3)).tolist() == [[0, 4, 7], [4, 7, 0]]
    assert not RunLengthLabel("x", (2, 3), ()).read((2, 3)).any()


def test_compressed_run_lengths():
    """Against the encoder, with runs that need one to three characters and negative differences."""
    rng = np.random.default_rng(0)
    mask = np.asfortranarray(np.repeat(np.repeat(rng.random((9, 5)) > 0.5, 40, 0), 60, 1).astype(np.uint8))
    mask[0, 0], mask[100, 100] = 1, 1 - mask[100, 100]
    code = {"size": list(mask.shape), "counts": coco_mask.encode(mask)["counts"].decode()}
    label = RunLengthLabel("x", mask.shape, ((3, code),)).read(mask.shape)
    np.testing.assert_array_equal(label, 3 * mask)


@pytest.mark.parametrize(
    "counts",
    [[1, 3], [1, 300000, 2], [10**12], [-1, 7], [], ["a"], [2.5, 3.5], None, "", "0", "13", "\x7f\x7f", "é", 5],
)
def test_run_lengths_that_do_not_fill_the_image(counts):
    label = RunLengthLabel("image x", (2, 3), ((4, {"size": [2, 3], "counts": counts}),))
    with pytest.raises(ReclipError, match="image x has a mask that is not a run-length code"):
        label.read((2, 3))


@pytest.mark.parametrize("category", ["a", -1, 10**30, None, [1]])
def test_categories_that_are_no_ids(category):
    label = RunLengthLabel("image x", (2, 3), ((category, {"size": [2, 3], "counts": [6]}),))
    with pytest.raises(ReclipError, match="image x has a mask of category .* not an id"):
        label.read((2, 3))


def test_a_declared_size_too_large_to_be_true():
    """Compared before it is allocated: this one would take 80 TB."""
    with pytest.raises(ReclipError, match=r"x has size \[10000000, 1000000\], its image \[2, 3\]"):
        RunLengthLabel("x", (10_000_000, 1_000_000), ()).read((2, 3))
