"""CVAT's Segmentation Mask 1.1, by its specification.

CVAT reads the archive as Pascal VOC's segmentation, by Datumaro: datumaro 1.13.12 read the same bytes as
``voc_segmentation`` (``read_with_libraries.py``).
"""

import io
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.formats import MaskClasses, Prediction, check_names
from reclip_d2.formats.cvat import CvatWriter, voc_color
from tests.formats.sample import COLORS, IGNORE, NAMES, sample_labels, write_sample

BACKGROUND = 3


def read(path):
    """The label map's names and colours, the image list, and the masks of both folders."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        lines = archive.read("labelmap.txt").decode("utf-8").splitlines()
        fields = [line.split(":") for line in lines if not line.startswith("#")]
        assert all(len(field) == 4 and field[2:] == ["", ""] for field in fields)
        colors = {name: tuple(map(int, color.split(","))) for name, color, *_ in fields}
        names = archive.read("ImageSets/Segmentation/default.txt").decode("utf-8").splitlines()
        masks = {}
        for folder in ("SegmentationClass", "SegmentationObject"):
            for name in names:
                with Image.open(io.BytesIO(archive.read(f"{folder}/{name}.png"))) as image:
                    assert image.mode == "RGB"
                    masks[folder, name] = np.asarray(image)
        assert len(archive.namelist()) == 2 + len(masks)
    return colors, names, masks


def write(folder, classes, labels):
    with CvatWriter(folder, classes) as writer:
        for path, label in labels.items():
            writer.add(Prediction(PurePosixPath(path), label))
        writer.finish()
    return folder / "segmentation_mask_1.1.zip"


def test_the_archive_by_its_specification(tmp_path):
    write_sample(tmp_path, ["cvat"])
    colors, names, masks = read(tmp_path / "cvat" / "segmentation_mask_1.1.zip")
    # Classes 0 and 2 have the same colour in the sample: the second moves to the next, blue 1.
    assert colors == {
        "background": (0, 0, 0),
        NAMES[0]: COLORS[0],
        NAMES[1]: COLORS[1],
        NAMES[2]: (0, 128, 1),
    }
    labels = {str(path.with_suffix("")): label for path, label in sample_labels().items()}
    assert names == sorted(labels)
    for name, label in labels.items():
        present = sorted(set(np.unique(label).tolist()) - {IGNORE, BACKGROUND})
        painted = np.zeros((*label.shape, 3), dtype=np.uint8)
        objects = painted.copy()
        for number, k in enumerate(present, start=1):
            painted[label == k] = colors[NAMES[k]]
            objects[label == k] = voc_color(number)
        assert np.array_equal(masks["SegmentationClass", name], painted)
        assert np.array_equal(masks["SegmentationObject", name], objects)


def test_voc_colours():
    # Pascal VOC's own: aeroplane, bicycle, bird, boat, tv monitor, and the border's 255.
    colors = [voc_color(number) for number in (0, 1, 2, 3, 4, 20, 255)]
    assert colors == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (0, 64, 128), (224, 224, 192)]


def test_a_class_called_background_is_black(tmp_path):
    classes = MaskClasses.make(["background", "tree"], [[9, 9, 9], [0, 0, 0]])
    colors, _, masks = read(write(tmp_path, classes, {"a.jpg": np.array([[0, 1, IGNORE]], dtype=np.uint8)}))
    assert colors == {"background": (0, 0, 0), "tree": (0, 0, 1)}
    assert masks["SegmentationClass", "a"].tolist() == [[[0, 0, 0], [0, 0, 1], [0, 0, 0]]]
    assert masks["SegmentationObject", "a"].tolist() == [[[0, 0, 0], [128, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("name", ["a:b", "#a"])
def test_class_names_that_break_the_label_map(name):
    with pytest.raises(ReclipError, match="cannot be written to CVAT's label map"):
        CvatWriter.check_classes(MaskClasses.make([name]))


@pytest.mark.parametrize("path", ["#a.jpg", " a.jpg", "b/a .jpg", "\u3000a.jpg", "a\u202f.jpg", "b/a\xa0.jpg"])
def test_image_names_that_break_the_image_list(tmp_path, path):
    """Of which the reader cuts the spaces at the ends, those of all scripts. They are refused beforehand too."""
    classes = MaskClasses.make(["tree"])
    with pytest.raises(ReclipError, match="cannot be written to CVAT's image list"):
        write(tmp_path, classes, {path: np.zeros((1, 1), np.uint8)})
    check_names(["index", "coco"], [PurePosixPath(path)])
    with pytest.raises(ReclipError, match="cannot be written to CVAT's image list"):
        check_names(["index", "cvat"], [PurePosixPath(path)])


def test_more_objects_than_colours(tmp_path):
    classes = MaskClasses.make([f"class {k}" for k in range(300)])
    labels = np.arange(256, dtype=np.uint16)[None]
    with pytest.raises(ReclipError, match="has 256 classes, CVAT allows 255"):
        write(tmp_path, classes, {"a.jpg": labels})
    write(tmp_path, classes, {"a.jpg": labels[:, 1:]})


def test_equal_predictions_give_equal_archives(tmp_path):
    labels = {str(path): label for path, label in sample_labels().items()}
    classes = MaskClasses.make(NAMES)
    first = write(tmp_path / "1", classes, labels).read_bytes()
    assert write(tmp_path / "2", classes, dict(reversed(labels.items()))).read_bytes() == first
