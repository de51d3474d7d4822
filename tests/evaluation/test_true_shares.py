"""Class shares in labels, by hand."""

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.evaluation.true_shares import label_shares


def write(folder, datasets, maps):
    """Two images with the labels; 77 is ignored."""
    records = []
    for index, values in enumerate(maps):
        image, label = folder / f"{index}.jpg", folder / f"{index}.png"
        Image.new("RGB", (2, 2)).save(image)
        Image.fromarray(np.array(values, dtype=np.uint8)).save(label)
        records.append({"file_name": str(image), "sem_seg_file_name": str(label)})
    datasets("reclip_test_shares", records, list("uvw"), ignore_label=77)
    return records, DatasetLabels("reclip_test_shares")


def test_shares_are_over_the_labelled_pixels_of_all_images(tmp_path, datasets):
    shares = label_shares(*write(tmp_path, datasets, [[[0, 2], [77, 0]], [[2, 2], [77, 77]]]))
    assert shares.tolist() == pytest.approx([2 / 5, 0, 3 / 5])


def test_nothing_but_ignored_pixels(tmp_path, datasets):
    with pytest.raises(ReclipError, match="reclip_test_shares: no pixel has a label"):
        label_shares(*write(tmp_path, datasets, [[[77, 77], [77, 77]]]))
