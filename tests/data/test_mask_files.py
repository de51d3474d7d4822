"""Folders of masks: which mask belongs to which image, and what its pixels mean."""

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.mask_files import NO_CLASS, MaskFiles, ids_of_names, resize_nearest
from reclip_d2.errors import ReclipError


def write(path, pixels, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=dtype)).save(path)


def test_a_mask_has_the_name_of_its_image(tmp_path):
    write(tmp_path / "a.png", [[0, 1], [255, 2]])
    masks = MaskFiles(tmp_path)
    assert masks.read("/images/a.jpg", (2, 2)).tolist() == [[0, 1], [NO_CLASS, 2]]


def test_suffix(tmp_path):
    write(tmp_path / "a_pred.png", [[3]])
    assert MaskFiles(tmp_path, suffix="_pred").read("a.jpg", (1, 1)).tolist() == [[3]]
    with pytest.raises(ReclipError, match=r"1 of 1 images have no mask in .* whose mask is a\.png"):
        MaskFiles(tmp_path).read("a.jpg", (1, 1))


def test_sub_folders_tell_masks_of_one_name_apart(tmp_path):
    for k, folder in enumerate(("day", "night", "night/wet")):
        write(tmp_path / folder / "1.png", [[k]])
    masks = MaskFiles(tmp_path)
    found = [masks.read(f"/data/{folder}/1.jpg", (1, 1)).item() for folder in ("day", "night", "night/wet")]
    assert found == [0, 1, 2]
    with pytest.raises(ReclipError, match="several masks"):
        masks.read("/data/other/1.jpg", (1, 1))


def test_two_images_need_two_masks(tmp_path):
    write(tmp_path / "day" / "1.png", [[0]])
    with pytest.raises(ReclipError, match="have the same mask, .*day/1.png: give masks the sub-folders"):
        MaskFiles(tmp_path).check(["/data/day/1.jpg", "/data/night/1.jpg"])


def test_sixteen_bits(tmp_path):
    write(tmp_path / "a.png", [[255, 300, 65535]], np.uint16)
    assert MaskFiles(tmp_path).read("a.jpg", (1, 3)).tolist() == [[255, 300, NO_CLASS]]


def test_ids_are_translated(tmp_path):
    write(tmp_path / "a.png", [[0, 1, 2, 255]])
    masks = MaskFiles(tmp_path, ids=[4, NO_CLASS, 0])
    assert masks.read("a.jpg", (1, 4)).tolist() == [[4, NO_CLASS, 0, NO_CLASS]]
    with pytest.raises(ReclipError, match="has id 2, but there are names for 0 to 1 only"):
        MaskFiles(tmp_path, ids=[0, 1]).read("a.jpg", (1, 4))


def test_another_size(tmp_path):
    write(tmp_path / "a.png", [[0, 1]])
    with pytest.raises(ReclipError, match="has size 2x1, its image 4x2"):
        MaskFiles(tmp_path).read("a.jpg", (2, 4))
    resized = MaskFiles(tmp_path, size_rule="nearest").read("a.jpg", (2, 4))
    assert resized.tolist() == [[0, 0, 1, 1]] * 2


def test_resize_takes_the_id_at_the_centre():
    """Centres of three pixels on five: 1/6, 1/2 and 5/6 of the length, in pixels 0, 2 and 4."""
    assert resize_nearest(np.array([[0, 1, 2, 3, 40000]]), (1, 3)).tolist() == [[0, 2, 40000]]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_nothing_to_read(tmp_path, make):
    make(tmp_path / "masks")
    with pytest.raises(ReclipError, match="does not exist|has no PNG"):
        MaskFiles(tmp_path / "masks")


def test_colour_masks_are_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ReclipError, match="RGB image: write a single-channel PNG of ids"):
        MaskFiles(tmp_path).read("a.jpg", (2, 2))


def test_names_in_another_order():
    classes = [["person", "human"], ["car"], ["dog"]]
    assert ids_of_names([["background"], ["Dog"], ["human", "people"]], classes) == [NO_CLASS, 2, 0]
    with pytest.raises(ReclipError, match="names of two classes, person and car"):
        ids_of_names([["car", "person"]], classes)
    with pytest.raises(ReclipError, match="none of the masks' names is a class"):
        ids_of_names([["tree"]], classes)
