"""Windows along one axis (``reclip_d2.data.tiling``)."""

import pytest

from reclip_d2.data.tiling import window_starts


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 10, 5, [0]),
        (7, 10, 5, [0]),
        (20, 10, 5, [0, 5, 10]),
        (21, 10, 5, [0, 5, 10, 11]),
        (11, 10, 10, [0, 1]),
        (30, 10, 10, [0, 10, 20]),
    ],
)
def test_window_starts_by_hand(length, window, stride, expected):
    assert window_starts(length, window, stride) == expected
