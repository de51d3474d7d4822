"""Precision and recall of hypotheses, by hand."""

import numpy as np
import pytest
from PIL import Image

from reclip_d2.evaluation.hypothesis import hypothesis_precision_recall


def test_micro_average_by_hand(tmp_path):
    # Image a: classes {0, 2} (255 ignored), proposed {0, 1}: one hit. Image b: {3}, proposed {3, 4, 5}: one hit.
    labels = {"a": [[0, 2], [255, 0]], "b": [[3, 3], [3, 3]]}
    files = {}
    for name, values in labels.items():
        files[name] = str(tmp_path / f"{name}.png")
        Image.fromarray(np.array(values, dtype=np.uint8)).save(files[name])
    quality = hypothesis_precision_recall({"a": [0, 1], "b": [3, 4, 5]}, files)
    assert quality["precision"] == pytest.approx(2 / 5)
    assert quality["recall"] == pytest.approx(2 / 3)
    assert quality["classes_per_image"] == pytest.approx(1.5)
    assert quality["classes_in_hypothesis"] == pytest.approx(2.5)
