"""``classes.json`` of exported files."""

import json
from pathlib import Path

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.export import DescribedFile, ExportOptions
from reclip_d2.formats import MaskClasses

CLASSES = MaskClasses.make(["sky", "wood"], [[1, 2, 3], [4, 5, 6]])


def described(folder, name="student.onnx", classes=CLASSES, **options):
    return DescribedFile(folder / name, classes, [0, 1, 255], "student", ExportOptions(**options), 512, 2048)


def read(folder):
    return json.loads((folder / "classes.json").read_text())


def test_content(tmp_path):
    described(tmp_path).write(overwrite=False)
    content = read(tmp_path)
    entry = content["files"].pop("student.onnx")
    assert content == {
        "ignore_label": 255,
        "background": None,
        "classes": [
            {"id": 0, "name": "sky", "color": [1, 2, 3]},
            {"id": 1, "name": "wood", "color": [4, 5, 6]},
        ],
        "files": {},
    }
    assert (entry["format"], entry["model"]) == ("onnx", "student")
    assert entry["input"] == {
        "name": "image",
        "type": "uint8",
        "shape": [1, 3, "height", "width"],
        "pixels": "RGB, 0 to 255, upright; normalisation and padding are in the graph",
        "resize_short_side_to": 512,
        "long_side_at_most": 2048,
    }
    assert entry["output"] == {
        "name": "logits",
        "type": "float32",
        "shape": [1, 3, "height", "width"],
        "channels": [0, 1, 255],
    }
    assert MaskClasses.read(tmp_path) == CLASSES  # as with masks


def test_labels_of_one_size():
    entry = described(Path("x"), "a.pt", format="torchscript", labels=True, size=(30, 40)).content()["files"]["a.pt"]
    assert entry["output"] == {"name": "labels", "type": "uint8", "shape": [1, 30, 40]}
    assert entry["input"]["shape"] == [1, 3, 30, 40] and entry["input"]["type"] == "uint8 or float32"


def test_several_files_of_the_same_classes(tmp_path):
    described(tmp_path).write(overwrite=False)
    described(tmp_path, "student.pt", format="torchscript").write(overwrite=False)
    described(tmp_path, labels=True).write(overwrite=True)
    files = read(tmp_path)["files"]
    assert {name: entry["output"]["name"] for name, entry in files.items()} == {
        "student.onnx": "labels",
        "student.pt": "logits",
    }


def test_beside_masks(tmp_path):
    CLASSES.write(tmp_path)
    described(tmp_path).write(overwrite=False)
    assert MaskClasses.read(tmp_path) == CLASSES and "student.onnx" in read(tmp_path)["files"]
    # Those of others keep their meaning.
    other = described(tmp_path, "b.onnx", classes=MaskClasses.make(["sea", "sand"]))
    for overwrite in (False, True):
        with pytest.raises(ReclipError, match=r"classes\.json has other classes: give an --output in another folder"):
            other.check(overwrite)


def test_only_an_export_that_is_replaced_may_have_been_of_other_classes(tmp_path):
    described(tmp_path).write(overwrite=False)
    other = described(tmp_path, classes=MaskClasses.make(["sea", "sand"]))
    with pytest.raises(ReclipError, match="has other classes"):
        other.check(overwrite=False)
    other.check(overwrite=True)
    other.write(overwrite=True)
    assert read(tmp_path)["classes"][0]["name"] == "sea"


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', "[" * 100_000, '{"classes": [], "files": {"x.onnx": 3}}'])
def test_a_damaged_description(text, tmp_path):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ReclipError, match=r"classes\.json is damaged"):
        described(tmp_path).check(overwrite=True)


def test_what_is_there_already(tmp_path):
    file = described(tmp_path)
    file.check(overwrite=False)
    file.path.write_bytes(b"x")
    with pytest.raises(ReclipError, match=r"student\.onnx exists: give --overwrite"):
        file.check(overwrite=False)
    file.check(overwrite=True)
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(ReclipError, match="is a folder"):
        file.check(overwrite=True)
