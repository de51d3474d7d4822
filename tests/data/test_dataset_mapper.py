"""The label-blind mapper, its augmentations and colour jitter."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import (
    LABEL_KEYS,
    ColorJitter,
    OpenCVResize,
    UnlabelledDatasetMapper,
    build_test_augmentations,
)
from reclip_d2.errors import ReclipError


@pytest.fixture
def record(tmp_path) -> dict:
    """A ramp: red rises with the column, green with the row."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[..., 0] = np.arange(60) * 4
    pixels[..., 1] = np.arange(40)[:, None] * 6
    path = tmp_path / "ramp.png"
    Image.fromarray(pixels).save(path)
    return {"file_name": str(path), "image_id": "ramp", "hypothesis": [2, 0]}


def config(**keys):
    cfg = load_config("")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 40
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.RANDOM_FLIP = False, "none"
    for key, value in keys.items():
        cfg.merge_from_list([f"INPUT.{key.replace('__', '.')}", value])
    return cfg


def mapped(record, is_train=True, **keys) -> dict:
    return UnlabelledDatasetMapper(config(**keys), is_train)(record)


def pixels_of(record) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(record["file_name"])).transpose(2, 0, 1).copy())


def test_output(record):
    before = {key: list(value) if isinstance(value, list) else value for key, value in record.items()}
    out = mapped(record)
    assert out["image"].dtype == torch.uint8 and torch.equal(out["image"], pixels_of(record))
    assert out["image"].is_contiguous()
    assert torch.equal(out["hypothesis"], torch.tensor([2, 0])) and out["hypothesis"].dtype == torch.int64
    assert (out["height"], out["width"]) == (40, 60)
    assert out["image_id"] == "ramp" and out["file_name"] == record["file_name"]
    assert record == before


def test_size_of_the_record_is_kept(record):
    out = mapped({**record, "height": 80, "width": 120})
    assert (out["height"], out["width"]) == (80, 120)


@pytest.mark.parametrize("key", LABEL_KEYS)
def test_a_label_is_refused_in_training_and_dropped_in_the_test(record, key):
    labelled = {**record, key: "label.png" if "file" in key else [{"a": 1}]}
    with pytest.raises(AssertionError, match=f"carries a label.*{key}"):
        mapped(labelled)
    assert key not in mapped(labelled, is_train=False)


def test_label_keys_name_those_of_detectron2():
    assert {"sem_seg_file_name", "annotations", "segments_info", "pan_seg_file_name"} <= set(LABEL_KEYS)


def test_shortest_edge(record):
    assert mapped(record, MIN_SIZE_TRAIN=(20,))["image"].shape == (3, 20, 30)
    assert mapped(record, MIN_SIZE_TRAIN=(80,), MAX_SIZE_TRAIN=90)["image"].shape == (3, 60, 90)
    assert mapped(record, is_train=False, MIN_SIZE_TEST=20)["image"].shape == (3, 20, 30)
    assert mapped(record, is_train=False, MIN_SIZE_TEST=80, MAX_SIZE_TEST=90)["image"].shape == (3, 60, 90)
    assert mapped(record, is_train=False, MIN_SIZE_TEST=0)["image"].shape == (3, 40, 60)


def test_crop_is_a_part_of_the_image(record):
    seen = set()
    for seed in range(5):
        np.random.seed(seed)
        crop = mapped(record, CROP__ENABLED=True, CROP__SIZE=[16, 20])["image"]
        assert crop.shape == (3, 16, 20)
        left, top = crop[0, 0, 0].item() // 4, crop[1, 0, 0].item() // 6
        assert torch.equal(crop, pixels_of(record)[:, top : top + 16, left : left + 20])
        seen.add((left, top))
    assert len(seen) > 1


def test_a_crop_larger_than_the_image_is_the_image(record):
    crop = mapped(record, CROP__ENABLED=True, CROP__SIZE=[512, 512])["image"]
    assert torch.equal(crop, pixels_of(record))


@pytest.mark.parametrize(("flip", "dims"), [("horizontal", [2]), ("vertical", [1])])
def test_flips(record, flip, dims):
    image, turned, seen = pixels_of(record), pixels_of(record).flip(dims), set()
    for seed in range(12):
        np.random.seed(seed)
        out = mapped(record, RANDOM_FLIP=flip)["image"]
        assert torch.equal(out, image) or torch.equal(out, turned)
        seen.add(torch.equal(out, turned))
    assert seen == {True, False}


def test_the_test_mapper_is_not_random(record):
    keys = {"CROP__ENABLED": True, "CROP__SIZE": [16, 20], "RANDOM_FLIP": "horizontal", "COLOR_JITTER": 0.5}
    for seed in range(4):
        np.random.seed(seed)
        assert torch.equal(mapped(record, is_train=False, **keys)["image"], pixels_of(record))


def test_missing_image(record):
    with pytest.raises(ReclipError, match=r"none\.jpg does not exist"):
        mapped({**record, "file_name": "/nowhere/none.jpg"})


# ---- colour ---------------------------------------------------------------------------------------------------


def jittered(image: np.ndarray, strength: float) -> np.ndarray:
    return ColorJitter(strength).get_transform(image).apply_image(image)


def test_a_uniform_grey_changes_by_the_brightness_factor_alone():
    grey = np.full((4, 5, 3), 100, np.uint8)
    values = set()
    for seed in range(30):
        np.random.seed(seed)
        out = jittered(grey, 0.3)
        assert out.dtype == np.uint8 and out.shape == grey.shape
        assert np.ptp(out) <= 1  # contrast and saturation do not change a uniform grey
        assert 68 <= out.min() and out.max() <= 131
        values.add(int(out[0, 0, 0]))
    assert len(values) > 10 and min(values) < 85 and max(values) > 115


def test_brightness_contrast_and_saturation_each_work_on_what_the_one_before_gave():
    """With brightness 1.5, contrast 1 and saturation 0.5 the grey that colours are mixed with is the bright one."""
    image = np.array([[[100, 40, 10], [20, 60, 90]]], np.uint8)
    jitter = ColorJitter(0.5)
    for part, factor in zip(jitter.parts, (1.5, 1.0, 0.5), strict=True):
        part.intensity_min = part.intensity_max = factor
    bright = image.astype(float) * 1.5
    grey = bright @ np.array([0.299, 0.587, 0.114])
    expected = 0.5 * grey[..., None] + 0.5 * bright
    out = jitter.get_transform(image).apply_image(image).astype(float)
    assert np.abs(out - expected).max() <= 2


def test_colour_in_the_mapper(record):
    np.random.seed(0)
    out = mapped(record, COLOR_JITTER=0.4)["image"]
    assert out.shape == (3, 40, 60) and out.dtype == torch.uint8
    assert not torch.equal(out, pixels_of(record))


def test_an_image_that_is_too_thin(tmp_path):
    """It would have no row left."""
    Image.fromarray(np.zeros((2, 300, 3), np.uint8)).save(tmp_path / "thin.png")
    with pytest.raises(ReclipError, match=r"thin\.png has 300 x 2 pixels, with one side more than 100 times the other"):
        mapped({"file_name": str(tmp_path / "thin.png"), "image_id": "thin"})


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [((30, 40), (15, 100), (15, 20)), ((30, 40), (15, 16), (12, 16)), ((33, 47), (20, 99), (20, 28))],
)
def test_resize_by_opencv(size, sides, expected):
    """The long side's limit wins; half-way sizes are rounded up; four pixels are blended."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    inputs = T.AugInput(image)
    T.AugmentationList([OpenCVResize(*sides)])(inputs)
    assert inputs.image.shape == (*expected, 3)
    rows, columns = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(expected, size, strict=True))
    y, x = (np.clip(np.floor(p).astype(int), 0, m - 2) for p, m in zip((rows, columns), size, strict=True))
    v, u = np.clip(rows - y, 0, 1)[:, None, None], np.clip(columns - x, 0, 1)[None, :, None]
    upper = image[y][:, x] * (1 - u) + image[y][:, x + 1] * u
    lower = image[y + 1][:, x] * (1 - u) + image[y + 1][:, x + 1] * u
    assert np.abs(upper * (1 - v) + lower * v - inputs.image).max() <= 1


def test_the_test_augmentation_by_key():
    cfg = load_config("", ["INPUT.RESIZE_TEST", "opencv", "INPUT.MIN_SIZE_TEST", "15", "INPUT.MAX_SIZE_TEST", "16"])
    (resize,) = build_test_augmentations(cfg)
    assert isinstance(resize, OpenCVResize) and (resize.short_side, resize.long_side) == (15, 16)
