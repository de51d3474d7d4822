"""Quality of hypotheses against labels: an analysis only, never an input of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reclip_d2.data.images import read_geometry
from reclip_d2.evaluation.label_files import DatasetLabels


def hypothesis_precision_recall(
    hypotheses: Mapping[str, Sequence[int]], records: Mapping[str, dict[str, Any]], labels: DatasetLabels
) -> dict[str, float]:
    """Micro-averaged precision and recall of each image's classes; ignored pixels have no class.

    Args:
        hypotheses: class ids by image id.
        records: labelled record (``file_name``, ``sem_seg_file_name``) by image id.
        labels: labels of the records' data set.

    Returns:
        ``{"precision", "recall", "classes_per_image", "classes_in_hypothesis"}``.

    Raises:
        ReclipError: a label is not a map of the data set's class ids, see :func:`read_label_file`.
    """
    hits = proposed = present = 0
    for image_id, hypothesis in hypotheses.items():
        record = records[image_id]
        ids = labels.read(record, read_geometry(record["file_name"]).upright)
        classes = set(np.unique(ids).tolist()) - {labels.ignore_label}
        found = set(labels.predicted_ids(np.asarray(hypothesis, dtype=np.int64)).tolist())
        hits += len(classes & found)
        proposed += len(found)
        present += len(classes)
    count = max(len(hypotheses), 1)
    return {
        "precision": hits / max(proposed, 1),
        "recall": hits / max(present, 1),
        "classes_per_image": present / count,
        "classes_in_hypothesis": proposed / count,
    }
