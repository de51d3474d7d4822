"""Stretches to 8 bits: limits by hand, rounding, and samples with nothing in them."""

import numpy as np
import pytest

from reclip_d2.data.stretch import Limits, limits_of


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("percentiles", (102, 298)),  # of 100, 101, ..., 300
        ("auto", (102 - 2, 298)),
        ("minmax", (100, 300)),
        ("none", (0, 65535)),
    ],
)
def test_limits(kind, expected):
    values = np.arange(100, 301, dtype=np.uint16)
    if kind == "percentiles":
        assert limits_of(values, values.dtype, kind, (1, 99)) == Limits(*expected)
    elif kind == "auto":
        low, high = 100 + 0.02 * 200, 100 + 0.98 * 200
        found = limits_of(values, values.dtype, kind)
        assert (found.low, found.high) == pytest.approx((low, high))
    else:
        assert limits_of(values, values.dtype, kind) == Limits(*expected)


def test_limits_of_types():
    """8 bits are pictures; signed samples are black from 0 down; floats without a stretch are 0 to 1."""
    assert limits_of(np.array([3, 9], np.uint8), np.dtype(np.uint8)) == Limits(0, 255)
    assert limits_of(np.array([3, 9], np.uint8), np.dtype(np.uint8), "minmax") == Limits(3, 9)
    assert limits_of(np.array([-5, 9], np.int16), np.dtype(np.int16), "none") == Limits(0, 32767)
    assert limits_of(np.array([0.5]), np.dtype(np.float32), "none") == Limits(0, 1)


def test_limits_of_difficult_samples():
    values = np.array([np.nan, np.inf, -np.inf, 2, 4], np.float32)
    assert limits_of(values, values.dtype, "minmax") == Limits(2, 4)
    assert limits_of(np.empty(0, np.float32), np.dtype(np.float32)) == Limits(0, 1)
    # Percentiles that fall on one value: nearly all pixels are equal.
    values = np.array([7] * 999 + [8], np.uint16)
    assert limits_of(values, values.dtype) == Limits(7, 8)


def test_to_8bit():
    values = np.array([0, 10, 15, 20, 1000], np.uint16)
    assert Limits(10, 20).to_8bit(values).tolist() == [0, 0, 128, 255, 255]  # 127.5 rounds to even
    assert Limits(10, 10).to_8bit(values).tolist() == [0] * 5
    assert Limits(0, 1).to_8bit(np.array([np.nan, -3, 0.5, 2], np.float32)).tolist() == [0, 0, 128, 255]
    same = np.arange(256, dtype=np.uint8)
    assert Limits(0, 255).to_8bit(same) is same
    # Close limits far from 0 need float64.
    far = np.array([16_777_216, 16_777_217, 16_777_218], np.uint32)
    assert Limits(16_777_216, 16_777_218).to_8bit(far).tolist() == [0, 128, 255]
