"""Shared by the evaluators of the two biases: labels by image, predictions as label maps, gathering.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.utils.io import atomic_write


class LabelEvaluator(DatasetEvaluator):
    """Base of evaluators that compare a predicted label map with a label file, image by image.

    It has the same inputs as ``LabelMapEvaluator``, so both can run in one pass in ``DatasetEvaluators``.
    Subclasses define :meth:`reset`, :meth:`count` and :meth:`evaluate`.
    """

    def __init__(self, dataset_name: str, distributed: bool = True, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: registered data set with labels (``sem_seg_file_name``).
            distributed: gather the counts of all processes; then only the main process has results.
            output_dir: folder in which :meth:`write` saves details; None to save nothing.
        """
        self.dataset_name = dataset_name
        self.distributed = distributed
        self.output_dir = output_dir
        self._labels = DatasetLabels(dataset_name)
        self.class_names = self._labels.class_names
        self.num_classes = self._labels.num_classes
        self.ignore_label = self._labels.ignore_label
        self._records = {record["file_name"]: record for record in DatasetCatalog.get(dataset_name)}
        self.reset()

    def count(self, prediction: np.ndarray, labels: np.ndarray, record: dict[str, Any]) -> None:
        """Count one image.

        Args:
            prediction, labels: ``(H, W)`` int64 class ids; labels may contain ``ignore_label``.
            record: record of the data set.
        """
        raise NotImplementedError

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Count one batch; see Detectron2's ``DatasetEvaluator``.

        Args:
            inputs: with ``file_name``.
            outputs: with ``sem_seg``, a label map ``(H, W)`` or logits ``(C, H, W)``.
        """
        for image, output in zip(inputs, outputs, strict=True):
            record = self._records[image["file_name"]]
            sem_seg = output["sem_seg"]
            prediction = (sem_seg if sem_seg.ndim == 2 else sem_seg.argmax(dim=0)).cpu().numpy().astype(np.int64)
            labels = self._labels.read(record, prediction.shape)
            self.count(self._labels.predicted_ids(prediction), labels.astype(np.int64), record)

    def gather(self, counts: Any) -> list[Any] | None:
        """The counts of all processes, on the main process; None on the others."""
        if not self.distributed:
            return [counts]
        comm.synchronize()
        gathered = comm.gather(counts)
        return gathered if comm.is_main_process() else None

    def write(self, name: str, details: dict[str, Any]) -> None:
        """Write details to ``<data set>_<name>.json`` in ``output_dir``, if there is one."""
        if self.output_dir:
            with atomic_write(os.path.join(self.output_dir, f"{self.dataset_name}_{name}.json")) as temporary:
                temporary.write_text(json.dumps(plain_json(details), indent=1) + "\n")


def plain_json(value: Any) -> Any:  # noqa: ANN401
    """Convert arrays to lists and NaN to None (JSON has no NaN), at any depth."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain_json(value.tolist())
    if isinstance(value, np.generic):
        return plain_json(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
