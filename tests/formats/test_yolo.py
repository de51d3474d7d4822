"""YOLO's polygons, by Ultralytics' specification: fractions of width and height, one region per line.

ultralytics 8.4.190 read the same bytes by the data set class that it trains with (``read_with_libraries.py``). It
leaves out images with a side below 10 pixels.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import yaml

from reclip_d2.errors import ReclipError
from reclip_d2.formats import MaskClasses, Prediction
from reclip_d2.formats.yolo import YoloWriter
from tests.formats.sample import CLASSES, IGNORE, NAMES, sample_labels, write_sample
from tests.formats.test_polygons import winding

BACKGROUND = 3


def lines_of(folder, labels, classes=CLASSES, path="a.jpg"):
    with YoloWriter(folder, classes) as writer:
        writer.add(Prediction(PurePosixPath(path), np.array(labels, dtype=classes.dtype)))
        writer.finish()
    return (folder / "labels" / path).with_suffix(".txt").read_text().splitlines()


def test_lines_by_hand(tmp_path):
    labels = [[0, 0, 1, IGNORE], [BACKGROUND, 0, 1, 0]]
    assert lines_of(tmp_path, labels) == [
        "0 0 0 0.5 0 0.5 1 0.25 1 0.25 0.5 0 0.5",  # an angle, of width 2 and height 2 of a 4 x 2 image
        "0 0.75 0.5 1 0.5 1 1 0.75 1",  # the class's other part
        "1 0.5 0 0.75 0 0.75 1 0.5 1",
    ]


def test_fractions_have_seven_decimals(tmp_path):
    assert lines_of(tmp_path, [[IGNORE, 0, IGNORE]]) == [
        "0 0.3333333 0 0.6666667 0 0.6666667 1 0.3333333 1",
    ]


def test_an_image_without_annotation_has_an_empty_file(tmp_path):
    assert lines_of(tmp_path, [[IGNORE, BACKGROUND]]) == []
    assert (tmp_path / "labels" / "a.txt").read_bytes() == b""


def test_polygons_enclose_the_masks(tmp_path):
    write_sample(tmp_path, ["yolo"])
    for path, label in sample_labels().items():
        seen = np.full(label.shape, IGNORE)
        for line in (tmp_path / "yolo" / "labels" / path).with_suffix(".txt").read_text().splitlines():
            k, *numbers = line.split()
            points = np.array(numbers, dtype=np.float64).reshape(-1, 2)
            assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
            corners = points * label.shape[::-1]
            assert np.allclose(corners, np.rint(corners), atol=1e-5)
            inside, _ = winding(np.rint(corners).astype(int), label.shape)
            assert (seen[inside == 1] == IGNORE).all()
            seen[inside == 1] = int(k)
        assert np.array_equal(seen, np.where(label == BACKGROUND, IGNORE, label))


def test_data_file_and_links(tmp_path):
    write_sample(tmp_path, ["yolo"])
    data = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text("utf-8"))
    assert data == {"train": "images", "val": "images", "names": dict(enumerate(NAMES))}
    for path in sample_labels():
        link = tmp_path / "yolo" / "images" / path
        assert link.is_symlink() and link.resolve() == (tmp_path / "photos" / path).resolve()
    assert not [file for file in (tmp_path / "yolo").rglob(".*")]


@pytest.mark.parametrize("before", ["copy", "link", "none"])
@pytest.mark.parametrize("mode", ["copy", "link", "none"])
def test_images_are_linked_copied_or_left_out(tmp_path, mode, before):
    source = tmp_path / "é.jpg"
    source.write_bytes(b"photo")
    prediction = Prediction(PurePosixPath("d/a.jpg"), np.zeros((1, 1), np.uint8), source=source)
    for images in (before, mode):
        with YoloWriter(tmp_path / "out", CLASSES, images=images) as writer:
            writer.add(prediction)
    last = mode if mode != "none" else before
    target = tmp_path / "out" / "images" / "d" / "a.jpg"
    assert target.is_symlink() == (last == "link") and target.exists() == (last != "none")
    if last != "none":
        assert target.read_bytes() == b"photo"
        assert [file.name for file in target.parent.iterdir()] == ["a.jpg"]
    assert source.read_bytes() == b"photo" and not source.is_symlink()


def test_links_of_relative_sources_lead_to_the_image(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"photo")
    monkeypatch.chdir(tmp_path)
    source = Path("photos/a.jpg")
    with YoloWriter(Path("out"), CLASSES) as writer:
        writer.add(Prediction(PurePosixPath("a.jpg"), np.zeros((1, 1), np.uint8), source=source))
    assert (tmp_path / "out" / "images" / "a.jpg").read_bytes() == b"photo"


def test_an_unknown_way_to_place_images(tmp_path):
    with pytest.raises(ReclipError, match="choose link, copy or none"):
        YoloWriter(tmp_path, CLASSES, images="move")


def test_class_ids_beyond_8_bits(tmp_path):
    classes = MaskClasses.make([f"class {k}" for k in range(300)])
    assert lines_of(tmp_path, [[255, 299, 65535, 65535]], classes) == [
        "255 0 0 0.25 0 0.25 1 0 1",
        "299 0.25 0 0.5 0 0.5 1 0.25 1",
    ]
