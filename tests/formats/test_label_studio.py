"""Label Studio: read back by its own converter.

The converter of label-studio-sdk 2.1.2 read the same bytes (``read_with_libraries.py``).
"""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import PurePosixPath

import numpy as np
from label_studio_converter.brush import decode_from_annotation

from reclip_d2.formats import Prediction
from reclip_d2.formats.label_studio import LabelStudioWriter
from tests.formats.sample import CLASSES, COLORS, IGNORE, NAMES, sample_labels, write_sample

BACKGROUND = 3


def flat(region):
    """A region as exported by the converter: with the value's members at the top level."""
    return {**region, **region["value"]}


def test_the_converter_reads_every_mask(tmp_path):
    write_sample(tmp_path, ["labelstudio"])
    tasks = json.loads((tmp_path / "labelstudio" / "tasks.json").read_text("utf-8"))
    labels = sample_labels()
    assert len(tasks) == len(labels)
    for path, task in zip(sorted(labels, key=str), tasks, strict=True):
        label = labels[path]
        regions = task["predictions"][0]["result"]
        present = sorted(set(np.unique(label).tolist()) - {IGNORE, BACKGROUND})
        assert [region["value"]["brushlabels"] for region in regions] == [[NAMES[k]] for k in present]
        for region in regions:
            assert (region["from_name"], region["to_name"], region["type"]) == ("brush", "image", "brushlabels")
            assert (region["original_height"], region["original_width"]) == label.shape
            assert region["image_rotation"] == 0 and region["value"]["format"] == "rle"
        layers = decode_from_annotation("brush", [flat(region) for region in regions])
        masks = {f"brush-{NAMES[k]}-0": 255 * (label == k) for k in present}
        assert layers.keys() == masks.keys()
        assert all(np.array_equal(layers[name], mask) for name, mask in masks.items())
    ids = [region["id"] for task in tasks for region in task["predictions"][0]["result"]]
    assert len(set(ids)) == len(ids)


def test_addresses_are_percent_encoded(tmp_path):
    for prefix, options in (("/data/local-files/?d=", {}), ("https://x/", {"image_prefix": "https://x/"})):
        with LabelStudioWriter(tmp_path, CLASSES, **options) as writer:
            writer.add(Prediction(PurePosixPath("a b/é&?.jpg"), np.zeros((1, 1), np.uint8)))
            writer.finish()
        (task,) = json.loads((tmp_path / "tasks.json").read_text("utf-8"))
        assert task["data"]["image"] == f"{prefix}a%20b/%C3%A9%26%3F.jpg"


def test_the_configuration_names_all_classes_but_the_background(tmp_path):
    with LabelStudioWriter(tmp_path, CLASSES) as writer:
        writer.finish()
    view = ElementTree.parse(tmp_path / "labeling_config.xml").getroot()
    image, brush = view
    assert (image.tag, image.get("name"), image.get("value")) == ("Image", "image", "$image")
    assert (brush.tag, brush.get("name"), brush.get("toName")) == ("BrushLabels", "brush", "image")
    assert [label.get("value") for label in brush] == NAMES[:BACKGROUND]
    assert [label.get("background") for label in brush] == ["#008000", "#0a14e6", "#008000"]
    assert COLORS[1] == (0x0A, 0x14, 0xE6)
    assert json.loads((tmp_path / "tasks.json").read_text()) == []
