"""Classes of masks and ``classes.json``."""

import json
import os

import numpy as np
import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.formats import MaskClasses
from reclip_d2.formats.classes import distinct_colors
from tests.formats.sample import CLASSES


def many(count):
    return MaskClasses.make([f"class {k}" for k in range(count)])


@pytest.mark.parametrize(
    ("count", "dtype", "ignore"), [(1, np.uint8, 255), (255, np.uint8, 255), (256, np.uint16, 65535)]
)
def test_more_than_255_classes_take_16_bits(count, dtype, ignore):
    classes = many(count)
    assert classes.dtype == dtype and classes.ignore_label == ignore


def test_classes_file_comes_back_as_it_was(tmp_path):
    CLASSES.write(tmp_path)
    assert MaskClasses.read(tmp_path) == CLASSES
    assert os.listdir(tmp_path) == ["classes.json"]
    content = json.loads((tmp_path / "classes.json").read_text("utf-8"))
    assert content["ignore_label"] == 255 and content["background"] == 3
    assert content["classes"][1] == {"id": 1, "name": "sky/água 雲", "color": [10, 20, 230]}
    CLASSES.write(tmp_path)  # the same classes again, as a resumed run does


def test_another_class_list_in_the_folder_is_refused(tmp_path):
    CLASSES.write(tmp_path)
    with pytest.raises(ReclipError, match="another class list"):
        many(4).write(tmp_path)
    assert MaskClasses.read(tmp_path) == CLASSES


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"background": null, "classes": [{"id": 1, "name": "a", "color": [0, 0, 0]}]}',
        '{"background": "a", "classes": [{"id": 0, "name": "a", "color": [0, 0, 0]}]}',
        '{"background": null, "classes": [{"id": 0, "name": "a", "color": [0, 0, 256]}]}',
    ],
)
def test_a_damaged_classes_file_is_one_line(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ReclipError, match=r"classes\.json is damaged") as info:
        MaskClasses.read(tmp_path)
    assert "\n" not in str(info.value)


def test_a_missing_classes_file(tmp_path):
    with pytest.raises(ReclipError, match=r"classes\.json is missing"):
        MaskClasses.read(tmp_path)


@pytest.mark.parametrize("names", [[], [""], [" a"], ["a\nb"], ["a\tb"], ["a", "b", "a"]])
def test_names_that_are_refused(names):
    with pytest.raises(ReclipError):
        MaskClasses.make(names)


@pytest.mark.parametrize("arguments", [{"palette": [[0, 0, 0]]}, {"background": 2}, {"background": -1}])
def test_arguments_that_do_not_fit(arguments):
    with pytest.raises(ValueError):
        MaskClasses.make(["a", "b"], **arguments)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_labels_take_the_classes_type(dtype):
    labels = CLASSES.checked(np.array([[0, 3, 255]], dtype=dtype), "a.jpg")
    assert labels.dtype == np.uint8 and labels.tolist() == [[0, 3, 255]]


@pytest.mark.parametrize("labels", [[[0, 4]], [[254, 1]], [[-1, 0]], [[65535, 0]], [[256, 0]]])
def test_ids_out_of_range_name_the_image(labels):
    with pytest.raises(ReclipError, match=r"a\.jpg has id"):
        CLASSES.checked(np.array(labels), "a.jpg")


def test_with_16_bits_255_is_a_class():
    classes = many(300)
    assert classes.checked(np.array([[255, 299, 65535]]), "a").tolist() == [[255, 299, 65535]]
    with pytest.raises(ReclipError, match="has id 300"):
        classes.checked(np.array([[300]]), "a")


def test_all_255_values_of_8_bits():
    labels = np.arange(256, dtype=np.uint8)[None]
    assert np.array_equal(many(255).checked(labels, "a"), labels)


def test_colors_that_are_equal_or_taken_move_to_the_next_free_one():
    colors = [(1, 1, 1), (0, 0, 0), (1, 1, 1), (0, 0, 255), (0, 0, 255), (255, 255, 255), (255, 255, 255)]
    assert distinct_colors(colors, {(0, 0, 0)}) == [
        (1, 1, 1),
        (0, 0, 1),
        (1, 1, 2),
        (0, 0, 255),
        (0, 1, 0),
        (255, 255, 255),
        (0, 0, 2),  # black, blue 1 and what follows are taken
    ]
