"""Rules that make a hypothesis from window classes or image scores."""

import numpy as np
import pytest

from reclip_d2.hypothesis.rules import (
    hypothesis_from_scores,
    hypothesis_from_windows,
    threshold_for_mean,
    window_frequencies,
)


@pytest.mark.parametrize(
    ("top1", "threshold", "expected"),
    [
        ([2, 2, 0, 1], 0.0, [0, 1, 2]),
        ([2, 2, 0, 1], 0.25, [2]),  # strictly greater: 1/4 does not pass
        ([2, 2, 0, 1], 0.24, [0, 1, 2]),
        ([2, 2, 0, 0], 0.5, [0]),  # none passes: the most frequent one, on a tie the lowest
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


def test_frequencies():
    assert window_frequencies([2, 2, 0, 1], 5).tolist() == [0.25, 0.25, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(1.0, 0.3), (1.2, 0.3), (1.25, 0.3), (1.3, 0.2), (1.5, 0.2), (2.1, 0.1), (2.5, 0.1), (3.0, -1.0), (99.0, -1.0)],
)
def test_threshold_by_hand(mean, expected):
    """Means at t: 0.3: 1; 0.2: 1.5; 0.1: 2.5, since 0.2 is there twice; -1: 3. Of two equally near the one of fewer."""
    assert threshold_for_mean(np.array([[0.5, 0.3, 0.1], [0.2, 0.2, 0.4]]), mean, -1.0) == expected


@pytest.mark.parametrize("lowest", [-1.0, 0.0])
@pytest.mark.parametrize("seed", range(12))
def test_threshold_equals_a_search_over_all(seed, lowest):
    random = np.random.default_rng(seed)
    scores = random.integers(-3, 8, (random.integers(1, 9), random.integers(1, 6))) / 8  # with ties
    thresholds = sorted({lowest, *(float(s) for s in scores.ravel() if s > lowest)}, reverse=True)

    def mean_at(threshold: float) -> float:
        return sum(len(hypothesis_from_scores(row.tolist(), threshold)) for row in scores) / len(scores)

    for wanted in (1.0, 1.25, 1.7, 2.0, 2.6, 3.0, 5.0):
        distances = [abs(mean_at(t) - wanted) for t in thresholds]  # from few classes to many
        best = min(distances)
        chosen = threshold_for_mean(scores, wanted, lowest)
        expected = mean_at(thresholds[[d <= best + 1e-12 for d in distances].index(True)])
        assert chosen >= lowest and mean_at(chosen) == pytest.approx(expected)
