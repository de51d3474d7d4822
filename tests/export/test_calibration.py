"""Calibration images: which are chosen, and their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.export import CalibrationImages


@pytest.fixture
def folder(tmp_path):
    """Ten images in two folders, all of one colour: the number of the image."""
    for number in range(10):
        path = tmp_path / "images" / ("a" if number < 6 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), number, np.uint8)).save(path)
    return tmp_path / "images"


def config(short_side=0):
    return load_config("", ["INPUT.MIN_SIZE_TEST", str(short_side), "INPUT.MAX_SIZE_TEST", "100"])


def numbers(images):
    return [int(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize(("count", "chosen"), [(10, [*range(10)]), (99, [*range(10)]), (4, [0, 2, 5, 7]), (1, [0])])
def test_images_at_equal_steps(folder, count, chosen):
    images = CalibrationImages.choose(str(folder), count, config())
    assert numbers(images) == numbers(images) == chosen  # each time
    assert (len(images), images.found) == (len(chosen), 10)


def test_pixels_are_resized_as_for_prediction(folder):
    (first, *_) = CalibrationImages.choose(str(folder), 2, config())
    assert first.shape == (3, 20, 30) and first.dtype == torch.uint8
    assert CalibrationImages.choose(str(folder), 2, config(40))[1].shape == (3, 40, 60)
    fixed = CalibrationImages.choose(str(folder), 2, config(40), size=(50, 24))[1]
    assert fixed.shape == (3, 50, 24) and fixed.unique().tolist() == [5]


def test_wrong_images(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in ("empty", "none"):
        with pytest.raises(ReclipError, match=f"--calibrate: .*{source}"):
            CalibrationImages.choose(str(tmp_path / source), 3, config())
    with pytest.raises(ReclipError, match="--calibration-images 0: give at least 1"):
        CalibrationImages.choose(str(folder), 0, config())
    (folder / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(ReclipError, match=r"a/0\.png cannot be read.*replace or remove"):
        list(CalibrationImages.choose(str(folder), 3, config()))
