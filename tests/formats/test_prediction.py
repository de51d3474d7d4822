"""Paths and arrays of predictions."""

from pathlib import PurePosixPath

import numpy as np
import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, Prediction, check_paths
from tests.formats.sample import CLASSES

LABELS = np.zeros((2, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "path",
    ["/a.jpg", "../a.jpg", "b/../../a.jpg", ".", "a\nb.jpg", "a\x85b.jpg", "a\u2028.jpg", "a\u2029.jpg", "b\udcff.jpg"],
)
def test_paths_that_are_refused(path):
    with pytest.raises(ReclipError) as info:
        Prediction(PurePosixPath(path), LABELS)
    assert "\n" not in str(info.value)
    with pytest.raises(ReclipError):
        check_paths([PurePosixPath(path)])


def test_two_images_of_one_stem_are_refused_by_name():
    paths = [PurePosixPath(p) for p in ("b/a.jpg", "a.jpg", "a.b.jpg", "a.c.jpg", "b/a.png")]
    check_paths(paths[:-1])
    with pytest.raises(ReclipError, match=r"b/a\.jpg and b/a\.png"):
        check_paths(paths)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("overlay", "scores")])
def test_writers_refuse_two_images_of_one_stem(tmp_path, name):
    with FORMATS[name](tmp_path, CLASSES) as writer:
        writer.add(Prediction(PurePosixPath("a.jpg"), LABELS))
        writer.add(Prediction(PurePosixPath("a.jpg"), LABELS))  # the same image again
        with pytest.raises(ReclipError, match=r"a\.jpg and a\.png"):
            writer.add(Prediction(PurePosixPath("a.png"), LABELS))


@pytest.mark.parametrize(
    "labels", [LABELS[0], LABELS[None], LABELS.astype(np.float32), np.zeros((0, 3), np.uint8), LABELS > 0]
)
def test_labels_that_are_no_label_map(labels):
    with pytest.raises(ValueError, match=r"labels of a\.jpg"):
        Prediction(PurePosixPath("a.jpg"), labels)


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": np.zeros((3, 2, 3), np.uint8)},
        {"image": np.zeros((2, 3, 3), np.float32)},
        {"scores": np.zeros((4, 3, 2), np.float16)},
        {"scores": np.zeros((4, 2, 3), np.float32)},
    ],
)
def test_arrays_of_another_size_or_type(arrays):
    with pytest.raises(ValueError, match=r"a\.jpg must be"):
        Prediction(PurePosixPath("a.jpg"), LABELS, **arrays)
