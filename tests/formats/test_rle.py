"""Run-length encoding, against values worked out by hand and pycocotools' own encoder."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from reclip_d2.formats import rle

LABELS = np.array([[0, 0, 1], [0, 255, 1]], dtype=np.uint8)


def test_runs_by_row_and_by_column():
    start, end, value = rle.runs(LABELS, by_column=False)
    assert (start.tolist(), end.tolist(), value.tolist()) == ([0, 2, 3, 4, 5], [2, 3, 4, 5, 6], [0, 1, 0, 255, 1])
    start, end, value = rle.runs(LABELS, by_column=True)
    assert (start.tolist(), end.tolist(), value.tolist()) == ([0, 3, 4], [3, 4, 6], [0, 255, 1])


def test_segments_by_hand():
    # Column by column the pixels are 0 0 0 255 1 1. Counts, outside first: 0 3 3 | 4 2 | 3 1 2; each below 16 is one
    # character, 48 + count.
    assert rle.segments(LABELS) == [
        rle.Segment(0, "033", 3, (0, 0, 2, 2)),
        rle.Segment(1, "42", 2, (2, 0, 1, 2)),
        rle.Segment(255, "312", 1, (1, 1, 1, 1)),
    ]


@pytest.mark.parametrize("block", [1, 3, 7, 1 << 24])
@pytest.mark.parametrize("shape", [(1, 1), (1, 23), (23, 1), (7, 9), (16, 16)])
def test_segments_are_what_pycocotools_encodes(monkeypatch, block, shape):
    monkeypatch.setattr(rle, "_BLOCK", block)  # label maps larger than a block are read in parts
    rng = np.random.default_rng(block + shape[0])
    labels = np.repeat(rng.choice([0, 1, 5, 300, 65535], (*shape, 1)), 2, axis=-1).reshape(shape[0], -1)
    labels = labels.astype(np.uint16)
    segments = rle.segments(labels)
    assert [segment.label for segment in segments] == np.unique(labels).tolist()
    for segment in segments:
        mask = np.asfortranarray(labels == segment.label, dtype=np.uint8)
        expected = coco_mask.encode(mask)
        assert segment.counts == expected["counts"].decode()
        assert segment.area == mask.sum()
        assert list(segment.bbox) == coco_mask.toBbox(expected).tolist()


@pytest.mark.parametrize("block", [1, 5, 1 << 24])
def test_runs_do_not_depend_on_the_block(monkeypatch, block):
    labels = np.random.default_rng(0).integers(0, 3, (6, 5)).astype(np.uint8)
    monkeypatch.setattr(rle, "_BLOCK", block)
    start, end, value = rle.runs(labels, by_column=False)
    assert np.array_equal(np.repeat(value, end - start), labels.ravel())
    assert (value[1:] != value[:-1]).all()
