"""Means and verdicts, by hand."""

import math

import pytest

from reclip_d2.experiments.measurements import (
    FAILS,
    HOLDS,
    NOISE,
    UNKNOWN,
    judge,
    paired_difference,
    spread,
    student_t_quantile,
)


@pytest.mark.parametrize(
    "degrees, t_95, t_50",  # from printed tables
    [(1, 12.7062, 1.0), (2, 4.3027, 0.8165), (3, 3.1824, 0.7649), (10, 2.2281, 0.6998), (29, 2.0452, 0.6830)],
)
def test_quantile_of_students_t(degrees, t_95, t_50):
    assert student_t_quantile(degrees) == pytest.approx(t_95, abs=6e-5)
    assert student_t_quantile(degrees, 0.5) == pytest.approx(t_50, abs=6e-5)


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([0.25, 0.75], digits=2) == "0.50 ± 0.35"  # sqrt(2 * 0.25^2)
    assert spread([7.04]) == spread([7.04, 7.04]) == "7.0"


def test_differences_are_taken_seed_by_seed():
    # 3, 4, 5: mean 4, standard deviation 1, standard error 1/sqrt(3); t of 2 degrees is 4.3027.
    better, worse = {0: 13.0, 1: 24.0, 2: 35.0}, {0: 10.0, 1: 20.0, 2: 30.0}
    difference = paired_difference(better, worse)
    assert difference.mean == pytest.approx(4)
    assert difference.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert difference.seeds == 3
    assert judge(better, worse).word == HOLDS
    assert judge(worse, better).word == FAILS
    # Unpaired, the spread over the seeds (10 points) would have hidden it.
    assert paired_difference({0: 13.0, 1: 24.0, 5: 1.0}, {0: 10.0, 1: 20.0, 2: 30.0}).seeds == 2


def test_a_small_difference_is_noise():
    # 0, 1, 2: mean 1, half width 4.30 / sqrt(3) = 2.48.
    verdict = judge({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert verdict.word == NOISE and verdict.difference.mean == pytest.approx(1)
    # 2.5, 3.5, 4.5 is just outside, 1.4, 2.4, 3.4 just inside.
    assert judge({0: 2.5, 1: 3.5, 2: 4.5}, {None: 0.0}).word == HOLDS
    assert judge({0: 1.4, 1: 2.4, 2: 3.4}, {None: 0.0}).word == NOISE
    assert judge({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).word == NOISE  # no spread, no difference


def test_a_row_without_seeds_meets_every_seed():
    difference = paired_difference({None: 10.0}, {0: 7.0, 1: 8.0, 2: 9.0})
    assert (difference.mean, difference.seeds) == (2, 3)


def test_two_rows_without_seeds_are_judged_by_the_sign():
    assert judge({None: 2.0}, {None: 1.9}).word == HOLDS
    assert judge({None: 1.9}, {None: 2.0}).word == FAILS
    assert judge({None: 2.0}, {None: 2.0}).word == NOISE
    assert judge({None: 2.0}, {None: 1.0}).difference.seeds == 0


def test_one_seed_says_nothing_of_noise_and_none_says_nothing():
    assert judge({4: 90.0}, {4: 10.0}).word == NOISE
    assert judge({4: 90.0}, {4: 10.0}).difference.seeds == 1
    for better, worse in (({}, {0: 1.0}), ({None: 1.0}, {}), ({0: 1.0}, {1: 1.0}), ({}, {})):
        assert judge(better, worse) == (UNKNOWN, None)
