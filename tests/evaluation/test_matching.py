"""Clusters matched to classes, by hand and by trying all assignments."""

import itertools

import numpy as np
import pytest

from reclip_d2.data.mask_files import NO_CLASS
from reclip_d2.evaluation.matching import cluster_ious, match_many_to_one, match_one_to_one

# Class 0 has 10 pixels, class 1 has 8. Cluster 0 takes most of both.
COUNTS = np.array([[6, 4, 0], [5, 1, 2]])


def test_one_to_one_by_hand():
    """6 + 2 = 8 matched pixels; 4 + 5 = 9 is more, so cluster 0 goes to class 1."""
    assert match_one_to_one(COUNTS).tolist() == [1, 0, NO_CLASS]


def test_ious_by_hand():
    expected = [[6 / 15, 4 / 11, 0], [5 / 14, 1 / 12, 2 / 8]]
    assert np.allclose(cluster_ious(COUNTS), expected)
    # .357 + .364 for (1, 0) and (0, 1), .4 + .25 for (0, 0) and (1, 2)
    assert match_one_to_one(COUNTS, "iou").tolist() == [1, 0, NO_CLASS]


@pytest.mark.parametrize("by", ["pixels", "iou"])
@pytest.mark.parametrize(("classes", "clusters"), [(3, 5), (4, 4), (5, 3), (1, 1)])
def test_no_assignment_is_better(by, classes, clusters):
    rng = np.random.default_rng(classes * 10 + clusters)
    counts = rng.integers(1, 50, (classes, clusters))
    gain = counts if by == "pixels" else cluster_ious(counts)
    found = match_one_to_one(counts, by)
    used = found != NO_CLASS
    assert used.sum() == min(classes, clusters) == len(set(found[used].tolist()))
    if classes <= clusters:
        best = max(sum(gain[c, k] for c, k in enumerate(p)) for p in itertools.permutations(range(clusters), classes))
    else:
        best = max(sum(gain[c, k] for k, c in enumerate(p)) for p in itertools.permutations(range(classes), clusters))
    assert np.isclose(sum(gain[found[k], k] for k in np.flatnonzero(used)), best)


def test_a_pair_without_common_pixels_is_no_match():
    assert match_one_to_one(np.array([[5, 0], [3, 0]])).tolist() == [0, NO_CLASS]


def test_many_to_one():
    """Both 0 and 1 have most pixels in class 0; ties go to the lowest id; an empty cluster gets none."""
    assert match_many_to_one(np.array([[6, 4, 2, 0], [5, 1, 2, 0]])).tolist() == [0, 0, 0, NO_CLASS]
