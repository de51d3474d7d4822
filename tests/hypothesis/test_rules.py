"""Rules that make a hypothesis of window classes or image scores."""

import pytest

from reclip_d2.hypothesis.rules import hypothesis_from_scores, hypothesis_from_windows


@pytest.mark.parametrize(
    ("top1", "threshold", "expected"),
    [
        ([2, 2, 0, 1], 0.0, [0, 1, 2]),
        ([2, 2, 0, 1], 0.25, [2]),  # strictly greater: 1/4 does not pass
        ([2, 2, 0, 1], 0.24, [0, 1, 2]),
        ([2, 2, 0, 0], 0.5, [0]),  # nobody passes: the most frequent, the lowest of several
        ([3, 1, 3, 1, 0], 0.9, [1]),
        ([3], 0.0, [3]),
        ([3], 0.99, [3]),
    ],
)
def test_windows(top1, threshold, expected):
    assert hypothesis_from_windows(top1, threshold) == expected


@pytest.mark.parametrize(("count", "passes"), [(7, False), (8, True)])
def test_seven_of_a_hundred_do_not_pass_seven_hundredths(count, passes):
    """Rounding to float32 must not let 7/100 > 0.07 through, nor 14/200."""
    assert (1 in hypothesis_from_windows([1] * count + [0] * (100 - count), 0.07)) == passes
    assert 1 not in hypothesis_from_windows([1] * 14 + [0] * 186, 0.07)


def test_classes_come_ascending_and_once():
    assert hypothesis_from_windows([5, 1, 5, 3, 1], 0.0) == [1, 3, 5]


@pytest.mark.parametrize(
    ("scores", "threshold", "expected"),
    [
        ([0.2, 0.25, 0.3], 0.23, [1, 2]),
        ([0.2, 0.25, 0.3], 0.25, [2]),
        ([0.2, 0.22, 0.21], 0.23, [1]),
        ([0.1, 0.2, 0.2], 0.23, [1]),
        ([-0.3, -0.1], 0.0, [1]),
    ],
)
def test_scores(scores, threshold, expected):
    assert hypothesis_from_scores(scores, threshold) == expected
