"""COCO: read back by pycocotools and Detectron2, and the panoptic PNGs by COCO's specification.

datumaro 1.13.12 read the same bytes as ``coco_instances`` and ``coco_panoptic`` (``read_with_libraries.py``).
COCO's own panopticapi is not on PyPI.
"""

import contextlib
import io
import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.formats.sample import COLORS, IGNORE, NAMES, sample_labels, write_sample

BACKGROUND = 3


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_sample(folder, ["coco", "coco_panoptic"])
    return folder


def test_pycocotools_reads_every_mask(sample):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(sample / "coco" / "annotations" / "instances_default.json")
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == dict(enumerate(NAMES, start=1))
    images = {image["file_name"]: image for image in coco.dataset["images"]}
    labels = sample_labels()
    assert list(images) == sorted(map(str, labels))
    for path, label in labels.items():
        image = images[str(path)]
        assert (image["height"], image["width"]) == label.shape
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        expected = sorted(set(np.unique(label).tolist()) - {IGNORE, BACKGROUND})
        assert [a["category_id"] - 1 for a in annotations] == expected
        for annotation in annotations:
            mask = label == annotation["category_id"] - 1
            assert np.array_equal(coco.annToMask(annotation), mask)
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
            assert (annotation["area"], annotation["bbox"], annotation["iscrowd"]) == (mask.sum(), box, 0)
    ids = [a["id"] for a in coco.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_detectron2_reads_it(sample):
    name = "formats_coco_sample"
    file = str(sample / "coco" / "annotations" / "instances_default.json")
    try:
        records = load_coco_json(file, str(sample / "photos"), name)
        assert MetadataCatalog.get(name).thing_classes == NAMES
    finally:
        MetadataCatalog.remove(name)
    by_file = {str(sample / "photos" / path): label for path, label in sample_labels().items()}
    assert {record["file_name"] for record in records} == set(by_file)
    for record in records:
        for annotation in record["annotations"]:
            mask = coco_mask.decode(annotation["segmentation"])
            assert np.array_equal(mask, by_file[record["file_name"]] == annotation["category_id"])


def test_panoptic_by_the_specification(sample):
    folder = sample / "coco_panoptic" / "annotations"
    content = json.loads((folder / "panoptic_default.json").read_text("utf-8"))
    categories = content["categories"]
    assert [(c["id"], c["name"], c["isthing"], tuple(c["color"])) for c in categories] == [
        (k + 1, name, 0, COLORS[k]) for k, name in enumerate(NAMES)
    ]
    images = {image["id"]: image["file_name"] for image in content["images"]}
    labels = {str(path): label for path, label in sample_labels().items()}
    assert sorted(images.values()) == sorted(labels) and len(content["annotations"]) == len(labels)
    for annotation in content["annotations"]:
        label = labels[images[annotation["image_id"]]]
        with Image.open(folder / "panoptic_default" / annotation["file_name"]) as image:
            assert image.mode == "RGB"
            red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
        ids = red + 256 * green + 65536 * blue
        assert np.array_equal(ids, np.where(label == IGNORE, 0, label.astype(int) + 1))
        for segment in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            assert segment["area"] == len(rows) and segment["iscrowd"] == 0
            x, y, width, height = segment["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert [s["id"] for s in annotation["segments_info"]] == sorted(set(ids.ravel().tolist()) - {0})
