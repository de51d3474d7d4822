"""Precision and recall of hypotheses, by hand."""

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.hypothesis import hypothesis_precision_recall
from reclip_d2.evaluation.label_files import DatasetLabels

# Image a: classes {0, 2} and 255, proposed {0, 1}: one hit. Image b: {3}, proposed {3, 4, 5}: one hit.
HYPOTHESES = {"a": [0, 1], "b": [3, 4, 5]}


def make_labels(folder, datasets, ignore_label: int) -> tuple[dict, DatasetLabels]:
    records = {}
    for name, values in {"a": [[0, 2], [ignore_label, 0]], "b": [[3, 3], [3, 3]]}.items():
        Image.new("RGB", (2, 2)).save(folder / f"{name}.jpg")
        Image.fromarray(np.array(values, dtype=np.uint8)).save(folder / f"{name}.png")
        records[name] = {
            "file_name": str(folder / f"{name}.jpg"),
            "sem_seg_file_name": str(folder / f"{name}.png"),
        }
    datasets("reclip_test_hypotheses", list(records.values()), list("uvwxyz"), ignore_label=ignore_label)
    return records, DatasetLabels("reclip_test_hypotheses")


@pytest.mark.parametrize("ignore_label", [255, 77])
def test_micro_average_by_hand(tmp_path, datasets, ignore_label):
    """The metadata's ignore label is not a class of the image."""
    quality = hypothesis_precision_recall(HYPOTHESES, *make_labels(tmp_path, datasets, ignore_label))
    assert quality["precision"] == pytest.approx(2 / 5)
    assert quality["recall"] == pytest.approx(2 / 3)
    assert quality["classes_per_image"] == pytest.approx(1.5)
    assert quality["classes_in_hypothesis"] == pytest.approx(2.5)


def test_labels_are_checked(tmp_path, datasets):
    records, labels = make_labels(tmp_path, datasets, 255)
    Image.fromarray(np.full((2, 2), 77, np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(ReclipError, match=r"b.png has id 77"):
        hypothesis_precision_recall(HYPOTHESES, records, labels)
