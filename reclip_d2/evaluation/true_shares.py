"""Class shares in the labels of images: for a control and to compare with estimates, never an input of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reclip_d2.data.images import read_geometry
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import DatasetLabels


def label_shares(records: Sequence[dict[str, Any]], labels: DatasetLabels) -> Tensor:
    """Share ``(C,)`` float32 of each class among the labelled pixels of all images, of sum 1.

    Args:
        records: with ``file_name`` and ``sem_seg_file_name``.
        labels: labels of the records' data set.

    Raises:
        ReclipError: no pixel is labelled, or a label is not a map of the data set's class ids.
    """
    counts = np.zeros(labels.num_classes, dtype=np.int64)
    for record in records:
        ids = labels.read(record, read_geometry(record["file_name"]).upright)
        counts += np.bincount(ids[ids != labels.ignore_label].astype(np.int64), minlength=labels.num_classes)
    if not counts.sum():
        raise ReclipError(f"{labels.dataset_name}: no pixel has a label")
    return torch.from_numpy(counts / counts.sum()).float()
