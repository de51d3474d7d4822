"""Datumaro's JSON, by its specification (version 1.0), with pycocotools for the masks.

datumaro itself reads the same bytes in ``test_with_libraries.py``: it cannot be installed with the project's
requirements, as it needs an older Pillow and an older OpenCV.
"""

import json

import numpy as np
from pycocotools import mask as coco_mask

from tests.formats.sample import COLORS, IGNORE, NAMES, sample_labels, write_sample


def test_the_json_by_its_specification(tmp_path):
    write_sample(tmp_path, ["datumaro"])
    content = json.loads((tmp_path / "datumaro" / "annotations" / "default.json").read_text("utf-8"))
    assert content["dm_format_version"] == "1.0" and content["media_type"] == 2 and content["infos"] == {}
    labels = content["categories"]["label"]["labels"]
    assert labels == [{"name": name, "parent": "", "attributes": []} for name in NAMES]
    colors = [(c["label_id"], c["r"], c["g"], c["b"]) for c in content["categories"]["mask"]["colormap"]]
    assert colors == [(k, *color) for k, color in enumerate(COLORS)]
    expected = sample_labels()
    assert [item["image"]["path"] for item in content["items"]] == sorted(map(str, expected))
    by_name = {str(path): (str(path.with_suffix("")), label) for path, label in expected.items()}
    for item in content["items"]:
        stem, label = by_name[item["image"]["path"]]
        assert item["id"] == stem and item["image"]["size"] == list(label.shape)
        seen = np.full(label.shape, IGNORE, dtype=np.uint8)
        for annotation in item["annotations"]:
            assert annotation["type"] == "mask" and annotation["rle"]["size"] == list(label.shape)
            seen[coco_mask.decode(annotation["rle"]) == 1] = annotation["label_id"]
        assert np.array_equal(seen, label)
        groups = [a["group"] for a in item["annotations"]]
        assert 0 not in groups and len(set(groups)) == len(groups)  # 0 is no group
        assert [a["label_id"] for a in item["annotations"]] == sorted(set(np.unique(label).tolist()) - {IGNORE})
