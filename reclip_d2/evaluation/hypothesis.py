"""Quality of hypotheses against labels: an analysis after the fact, never an input of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image


def hypothesis_precision_recall(
    hypotheses: Mapping[str, Sequence[int]], label_files: Mapping[str, str], ignore_label: int = 255
) -> dict[str, float]:
    """Micro-averaged precision and recall of the classes of each image.

    Args:
        hypotheses: class ids by image id.
        label_files: index PNG by image id.

    Returns:
        ``{"precision", "recall", "classes_per_image", "classes_in_hypothesis"}``.
    """
    hits = proposed = present = 0
    for image_id, hypothesis in hypotheses.items():
        with Image.open(label_files[image_id]) as image:
            classes = set(np.unique(np.asarray(image)).tolist()) - {ignore_label}
        hits += len(classes & set(hypothesis))
        proposed += len(hypothesis)
        present += len(classes)
    count = max(len(hypotheses), 1)
    return {
        "precision": hits / max(proposed, 1),
        "recall": hits / max(present, 1),
        "classes_per_image": present / count,
        "classes_in_hypothesis": proposed / count,
    }
