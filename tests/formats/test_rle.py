"""Run-length encodings, against values and bits worked out by hand, pycocotools' encoder and Label Studio's decoder."""

import numpy as np
import pytest
from label_studio_converter.brush import decode_rle
from pycocotools import mask as coco_mask

from reclip_d2.errors import ReclipError
from reclip_d2.formats import rle
from reclip_d2.formats.rle import encode_mask, runs_by_label

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


SIZES = "0010" + "0011" + "0111" + "1111"  # 3, 4, 8 and 16 bits, each less 1


def to_bytes(bits: str) -> bytes:
    bits = bits.replace(" ", "")
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def test_two_pixels_by_hand():
    # 2 pixels are 8 bytes: a run (1) of the first size (00), of 3 + 1 bytes (011), of 255; then the same of 0.
    bits = f"{8:032b} 00111 {SIZES} 1 00 011 11111111 1 00 011 00000000"
    assert encode_mask(np.array([0]), np.array([1]), pixels=2) == to_bytes(bits)


def test_each_size_by_hand():
    # Runs of 1, 3, 5 and 100 pixels: 4, 12, 20 and 400 bytes.
    bits = (
        f"{436:032b} 00111 {SIZES} 1 00 011 00000000 1 01 1011 11111111 1 10 {19:08b} 00000000 1 11 {399:016b} 11111111"
    )
    assert encode_mask(np.array([1, 9]), np.array([4, 109]), pixels=109) == to_bytes(bits)


@pytest.mark.parametrize("pixels", [16383, 16384, 16385, 40000])
def test_runs_beyond_16_bits_are_cut(pixels):
    encoded = encode_mask(np.array([0]), np.array([pixels]), pixels)
    assert np.array_equal(decode_rle(list(encoded)), np.full(4 * pixels, 255))


def test_nothing_inside():
    encoded = encode_mask(np.zeros(0, np.int64), np.zeros(0, np.int64), 5)
    assert np.array_equal(decode_rle(list(encoded)), np.zeros(20))


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (31, 1), (13, 17)])
def test_random_masks_come_back(shape):
    labels = np.random.default_rng(shape[1]).integers(0, 3, shape).astype(np.uint8)
    for label, start, end in runs_by_label(labels, by_column=False):
        decoded = decode_rle(list(encode_mask(start, end, labels.size))).reshape(*shape, 4)
        assert np.array_equal(decoded, np.repeat(255 * (labels == label)[..., None], 4, axis=2))


def test_too_many_pixels_to_count():
    with pytest.raises(ReclipError, match="too large for Label Studio"):
        encode_mask(np.array([0]), np.array([1]), pixels=1 << 30)
