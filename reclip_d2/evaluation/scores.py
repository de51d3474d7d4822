"""Scores of a segmentation whose pixels may have no class, from its confusion matrix.

Shape letters: C classes.
"""

from __future__ import annotations

import numpy as np


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class.

    Args:
        confusion: ``(C, C + 1)`` int64: pixels by label and prediction; the last column counts pixels without a
            predicted class, which are wrong for their label and for no other class.

    Returns:
        ``(C,)`` in [0, 1]; NaN for a class that no label has.
    """
    num_classes = len(confusion)
    hits = confusion[:, :num_classes].diagonal()
    labelled = confusion.sum(1)
    union = labelled + confusion[:, :num_classes].sum(0) - hits
    return np.divide(hits, union, out=np.full(num_classes, np.nan), where=labelled > 0)


def segmentation_scores(confusion: np.ndarray) -> dict[str, float]:
    """``mIoU``, ``fwIoU``, ``mACC`` and ``pACC``, as Detectron2's ``SemSegEvaluator`` defines them, in percent.

    Means are over the classes that occur in the labels.

    Args:
        confusion: see :func:`iou_per_class`; at least one pixel.
    """
    num_classes = len(confusion)
    labelled = confusion.sum(1)
    hits = confusion[:, :num_classes].diagonal()
    ious, present = iou_per_class(confusion), labelled > 0
    return {
        "mIoU": 100 * float(ious[present].mean()),
        "fwIoU": 100 * float((ious[present] * labelled[present]).sum() / labelled.sum()),
        "mACC": 100 * float((hits[present] / labelled[present]).mean()),
        "pACC": 100 * float(hits.sum() / labelled.sum()),
    }
