"""Measuring class-preference bias (ReCLIP++, section IV-D and Table VII).

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from reclip_d2.evaluation.label_evaluator import LabelEvaluator


def confusion_matrix(prediction: np.ndarray, labels: np.ndarray, num_classes: int, ignore_label: int) -> np.ndarray:
    """Confusion matrix: pixels by label (row) and prediction (column).

    Args:
        prediction: class ids 0 to C - 1, any shape.
        labels: class ids or ``ignore_label``, the same shape; ignored pixels do not count.

    Returns:
        ``(C, C)`` int64.

    Raises:
        ValueError: an id is out of range.
    """
    valid = labels != ignore_label
    truth, predicted = labels[valid].astype(np.int64), prediction[valid].astype(np.int64)
    for ids in (truth, predicted):
        if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
            raise ValueError(f"class ids are 0 to {num_classes - 1}, found {ids.min()} to {ids.max()}")
    return np.bincount(truth * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def row_normalized(confusion: np.ndarray) -> np.ndarray:
    """Confusion matrix ``(C, C)`` with each row divided by its sum: the distribution of a class's pixels over
    predictions.

    Returns:
        ``(C, C)`` float64; the row of a class without pixels is NaN.
    """
    pixels = confusion.sum(axis=1, keepdims=True)
    return np.divide(confusion, pixels, out=np.full(confusion.shape, np.nan), where=pixels > 0)


def class_preference_scores(normalized: np.ndarray) -> np.ndarray:
    """Score of each class: its row's diagonal entry minus the row's largest other entry (section IV-D).

    1 where all pixels of the class are right; negative where another class takes more of them than the class itself.

    Args:
        normalized: ``(C, C)``, see :func:`row_normalized`.

    Returns:
        ``(C,)`` in [-1, 1]; NaN for a class without pixels.
    """
    others = normalized.copy()
    np.fill_diagonal(others, -np.inf)
    # initial: with one class there is no other entry, and the maximum is 0
    return normalized.diagonal() - others.max(axis=1, initial=0)


def class_preference_score(normalized: np.ndarray) -> float:
    """Mean of :func:`class_preference_scores` over the classes that have pixels (Table VII); NaN if none has.

    The higher, the less other classes are preferred. The unit is the matrix's: fractions of a class's pixels.
    """
    scores = class_preference_scores(normalized)
    return float(scores[~np.isnan(scores)].mean()) if not np.isnan(scores).all() else float("nan")


class ClassPreferenceEvaluator(LabelEvaluator):
    """Class-preference score of a model's predictions, over all pixels of a data set.

    After :meth:`evaluate`, ``confusion`` holds the counts ``(C, C)`` of all processes, on the main one.
    """

    def reset(self) -> None:
        """Reset all counts."""
        self.confusion = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)

    def count(self, prediction: np.ndarray, labels: np.ndarray, record: dict[str, Any]) -> None:
        self.confusion += confusion_matrix(prediction, labels, self.num_classes, self.ignore_label)

    def evaluate(self) -> dict[str, Any] | None:
        """``{"class_preference": {"score", "score-<class>": ...}}``; on the main process only.

        With ``output_dir`` the matrix is written next to it.
        """
        counts = self.gather(self.confusion)
        if counts is None:
            return None
        self.confusion = np.sum(counts, axis=0)
        normalized = row_normalized(self.confusion)
        scores = class_preference_scores(normalized)
        result = {"score": class_preference_score(normalized)}
        result.update({f"score-{name}": float(s) for name, s in zip(self.class_names, scores, strict=True)})
        self.write(
            "class_preference",
            {
                "score": result["score"],
                "classes": self.class_names,
                "class_scores": scores,
                "confusion_pixels": self.confusion,
                "confusion_row_normalized": normalized,
            },
        )
        return OrderedDict(class_preference=result)
