"""FiftyOne's ``ImageSegmentationDirectory``, by its specification.

The importer of fiftyone 1.22.1 read the same bytes, without a database (``read_with_libraries.py``).
"""

import json
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from reclip_d2.formats import MaskClasses, Prediction
from reclip_d2.formats.fiftyone import FiftyOneWriter
from tests.formats.sample import IGNORE, NAMES, sample_labels, write_sample


def test_the_folder_by_its_specification(tmp_path):
    write_sample(tmp_path, ["fiftyone"])
    folder = tmp_path / "fiftyone"
    # Images and masks are matched by their path without extension.
    images = {file.relative_to(folder / "data").with_suffix(""): file for file in folder.glob("data/**/*.*")}
    masks = {file.relative_to(folder / "labels").with_suffix(""): file for file in folder.glob("labels/**/*.*")}
    labels = {path.with_suffix(""): label for path, label in sample_labels().items()}
    assert set(map(str, images)) == set(map(str, masks)) == set(map(str, labels))
    for stem, label in labels.items():
        with Image.open(folder / "labels" / f"{stem}.png") as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), np.where(label == IGNORE, 0, label + 1))
    targets = json.loads((folder / "mask_targets.json").read_text("utf-8"))
    assert targets == {str(k + 1): name for k, name in enumerate(NAMES)}


def test_values_at_the_limits(tmp_path):
    for count, mode, top in ((255, "L", 255), (300, "I;16", 300)):
        classes = MaskClasses.make([f"class {k}" for k in range(count)])
        labels = np.array([[0, count - 1, classes.ignore_label]], dtype=classes.dtype)
        with FiftyOneWriter(tmp_path, classes) as writer:
            writer.add(Prediction(PurePosixPath("a.jpg"), labels))
        with Image.open(tmp_path / "labels" / "a.png") as image:
            assert image.mode == mode and np.asarray(image).tolist() == [[1, top, 0]]
    assert not (tmp_path / "data").exists()  # no image's file was known
