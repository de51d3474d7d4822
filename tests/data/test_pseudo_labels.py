"""Masks of another system as pseudo labels: their classes, confidence and augmentation."""

import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.mask_files import NO_CLASS, MaskFiles
from reclip_d2.data.pseudo_labels import PseudoLabels
from reclip_d2.errors import ReclipError
from tests.helpers import datasets

__all__ = ["datasets"]

NAME = "reclip_test_pseudo_labels"


def save(path, pixels, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=dtype)).save(path)
    return str(path)


def test_pixels_of_low_confidence_have_no_label(tmp_path):
    save(tmp_path / "masks" / "a.png", [[0, 1, 2, 255]])
    save(tmp_path / "sure" / "a.png", [[255, 127, 128, 255]])
    labels = PseudoLabels(MaskFiles(tmp_path / "masks"), MaskFiles(tmp_path / "sure"), threshold=0.5)
    assert labels.read("a.jpg", (1, 4)).tolist() == [[0, NO_CLASS, 2, NO_CLASS]]


def test_confidence_of_sixteen_bits(tmp_path):
    save(tmp_path / "masks" / "a.png", [[0, 1]])
    save(tmp_path / "sure" / "a.png", [[6554, 6553]], np.uint16)
    labels = PseudoLabels(MaskFiles(tmp_path / "masks"), MaskFiles(tmp_path / "sure"), threshold=0.1)
    assert labels.read("a.jpg", (1, 2)).tolist() == [[0, NO_CLASS]]


def config(folder, *opts):
    keys = ("MODEL.META_ARCHITECTURE", "Distillation", "MODEL.TEACHER.META_ARCHITECTURE", "MaskFolder")
    keys += ("MODEL.TEACHER.MASKS.FOLDER", str(folder), "DATASETS.TRAIN", f"('{NAME}',)")
    return load_config("", [*keys, *opts])


def test_ids_by_name(tmp_path, datasets):
    datasets(NAME, [], ["sky", "tree", "car"])
    save(tmp_path / "masks" / "a.png", [[0, 1, 2]])
    names = tmp_path / "names.txt"
    names.write_text("car\nroad\nsky\n")
    labels = PseudoLabels.from_config(config(tmp_path / "masks", "MODEL.TEACHER.MASKS.NAMES", str(names)))
    assert labels.read("a.jpg", (1, 3)).tolist() == [[2, NO_CLASS, 0]]
    own = PseudoLabels.from_config(config(tmp_path / "masks"))
    assert own.read("a.jpg", (1, 3)).tolist() == [[0, 1, 2]]


def test_other_teachers_have_none():
    assert PseudoLabels.from_config(load_config("")) is None


@pytest.mark.parametrize("classes", [3, 300])
def test_masks_pass_through_the_augmentation(tmp_path, classes):
    """Each pixel's grey level is its class, so that image and mask can be compared after a crop and a flip."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (12, 16))
    image = save(tmp_path / "images" / "a.png", np.repeat(mask[..., None] * 50, 3, axis=2))
    mask[:, 3] = 65535 if classes > 255 else 255
    mask[mask == 2] = classes - 1
    save(tmp_path / "masks" / "a.png", mask, np.uint16 if classes > 255 else np.uint8)
    mapper = UnlabelledDatasetMapper(
        augmentations=[T.RandomCrop("absolute", (8, 10)), T.RandomFlip(prob=1.0)],
        pseudo_labels=PseudoLabels(MaskFiles(tmp_path / "masks")),
    )
    sample = mapper({"file_name": image, "image_id": "a"})
    labels = sample["pseudo_labels"]
    assert labels.shape == (8, 10) == sample["image"].shape[1:]
    expected = (sample["image"][0] // 50).long()
    expected[expected == 2] = classes - 1
    known = labels != NO_CLASS
    assert (labels[known] == expected[known]).all() and (~known).sum() in (0, 8)
    assert (~known).any(dim=0).sum() <= 1


def test_labels_of_the_data_set_are_refused(tmp_path, datasets):
    image = save(tmp_path / "images" / "a.png", np.zeros((2, 2, 3)))
    label = save(tmp_path / "labels" / "a.png", np.zeros((2, 2)))
    datasets(NAME, [{"file_name": image}], ["x", "y"])
    datasets(f"{NAME}_labelled", [{"file_name": image, "sem_seg_file_name": label}], ["x", "y"])
    with pytest.raises(ReclipError, match="has labels of a data set .*training uses no labels"):
        PseudoLabels(MaskFiles(tmp_path / "labels")).check([NAME])
    save(tmp_path / "masks" / "a.png", np.zeros((2, 2)))
    PseudoLabels(MaskFiles(tmp_path / "masks")).check([NAME])


def test_labels_of_a_test_set_are_refused_through_links_too(tmp_path, datasets):
    image = save(tmp_path / "images" / "a.png", np.zeros((2, 2, 3)))
    label = save(tmp_path / "labels" / "a.png", np.zeros((2, 2)))
    datasets(NAME, [{"file_name": image}], ["x", "y"])
    datasets(f"{NAME}_test", [{"file_name": image, "sem_seg_file_name": label}], ["x", "y"])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").hardlink_to(label)
    for folder in ("labels", "linked"):
        with pytest.raises(ReclipError, match="training uses no labels"):
            PseudoLabels(MaskFiles(tmp_path / folder)).check([NAME], [f"{NAME}_test"])


def test_a_missing_mask_or_confidence(tmp_path, datasets):
    records = [{"file_name": save(tmp_path / "images" / f"{k}.png", np.zeros((2, 2, 3)))} for k in range(2)]
    datasets(NAME, records, ["x", "y"])
    save(tmp_path / "masks" / "0.png", np.zeros((2, 2)))
    with pytest.raises(ReclipError, match="1 of 2 images have no mask"):
        PseudoLabels(MaskFiles(tmp_path / "masks")).check([NAME])
    save(tmp_path / "masks" / "1.png", np.zeros((2, 2)))
    save(tmp_path / "sure" / "1.png", np.zeros((2, 2)))
    with pytest.raises(ReclipError, match="1 of 2 images have no mask in .*sure"):
        PseudoLabels(MaskFiles(tmp_path / "masks"), MaskFiles(tmp_path / "sure")).check([NAME])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.TEACHER.META_ARCHITECTURE", "MaskFolder"], r"needs MODEL\.TEACHER\.MASKS\.FOLDER"),
        (["MODEL.META_ARCHITECTURE", "MaskFolder"], "MaskFolder is a teacher"),
    ],
)
def test_keys_that_contradict_each_other(opts, message):
    with pytest.raises(ReclipError, match=message):
        load_config("", ["MODEL.META_ARCHITECTURE", "Distillation", *opts])
