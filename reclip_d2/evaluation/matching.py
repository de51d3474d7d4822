"""Classes for the clusters of systems that know no names, from labels, as Table I scores such systems.

Shape letters: C classes, K clusters.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from reclip_d2.data.mask_files import NO_CLASS

MATCHINGS = ("one-to-one", "many-to-one")


def cluster_ious(counts: np.ndarray) -> np.ndarray:
    """IoU of each class with each cluster.

    Args:
        counts: ``(C, K)`` int64: labelled pixels by class and cluster.

    Returns:
        ``(C, K)`` float64; 0 where both are empty.
    """
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    return np.divide(counts, union, out=np.zeros(counts.shape), where=union > 0)


def match_one_to_one(counts: np.ndarray, by: str = "pixels") -> np.ndarray:
    """Hungarian matching: each cluster gets at most one class, and each class at most one cluster.

    Args:
        counts: ``(C, K)``, see :func:`cluster_ious`.
        by: what the assignment maximises: the number of matched ``pixels`` (IIC, PiCIE), or the sum of the pairs'
            ``iou``.

    Returns:
        ``(K,)`` int64: class of each cluster; :data:`NO_CLASS` without one (K > C, or no pixel in common).
    """
    gain = counts if by == "pixels" else cluster_ious(counts)
    classes = np.full(counts.shape[1], NO_CLASS, dtype=np.int64)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    used = counts[rows, columns] > 0
    classes[columns[used]] = rows[used]
    return classes


def match_many_to_one(counts: np.ndarray) -> np.ndarray:
    """Each cluster gets the class of most of its labelled pixels; the lowest id on a tie.

    Returns:
        ``(K,)`` int64; :data:`NO_CLASS` for a cluster without labelled pixels.
    """
    return np.where(counts.sum(0) > 0, counts.argmax(0), NO_CLASS)
