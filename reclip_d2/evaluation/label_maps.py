"""Detectron2's ``SemSegEvaluator`` on label maps, with our own checked reading of label files."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils import comm

from reclip_d2.data.images import read_geometry
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import DatasetLabels

logger = logging.getLogger(__name__)
_SILENT = logging.Logger("silent", level=logging.CRITICAL + 1)


class LabelMapEvaluator(SemSegEvaluator):
    """``SemSegEvaluator`` that takes ``{"sem_seg": (H, W) int64 labels}`` as well as ``(C, H, W)`` logits.

    The numbers are Detectron2's, except the mean (see :meth:`evaluate`). Label files are read by
    :class:`DatasetLabels`: otherwise an RGB label or an id out of range would raise a traceback, and binary masks or
    palettes in another order would be counted silently.
    """

    def __init__(self, dataset_name: str, distributed: bool = True, output_dir: str | None = None) -> None:
        """See Detectron2's ``SemSegEvaluator``."""
        super().__init__(dataset_name, distributed, output_dir)
        self._labels = DatasetLabels(dataset_name)
        self._class_names, self._num_classes = self._labels.class_names, self._labels.num_classes
        self._records = {record["file_name"]: record for record in DatasetCatalog.get(dataset_name)}

    def reset(self) -> None:
        """Reset all counts."""
        super().reset()
        self._label_ids: set[int] = set()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Count one batch; see Detectron2's ``DatasetEvaluator``."""
        for image, output in zip(inputs, outputs, strict=True):
            sem_seg = output["sem_seg"]
            prediction = (sem_seg if sem_seg.ndim == 2 else sem_seg.argmax(dim=0)).cpu().numpy().astype(np.int64)
            prediction = self._labels.predicted_ids(prediction)
            ids = self._labels.read(self._records[image["file_name"]], prediction.shape).astype(np.int64)
            self._label_ids |= set(np.unique(ids).tolist())
            truth = np.where(ids == self._ignore_label, self._num_classes, ids)
            self._conf_matrix += self._confusion(prediction, truth)
            if getattr(self, "_compute_boundary_iou", False):  # since Detectron2 0.6
                borders = [self._mask_to_boundary(labels.astype(np.uint8)) for labels in (prediction, truth)]
                self._b_conf_matrix += self._confusion(*(labels.astype(np.int64) for labels in borders))
            if self._output_dir:
                self._predictions.extend(self.encode_json_sem_seg(prediction, image["file_name"]))

    def _confusion(self, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Pixels by prediction (row) and truth (column), ``(C + 1, C + 1)``; the last are the ignored ones."""
        side = self._num_classes + 1
        return np.bincount(side * prediction.reshape(-1) + truth.reshape(-1), minlength=side**2).reshape(side, side)

    def evaluate(self) -> dict[str, Any] | None:
        """Results of Detectron2's evaluator; on the main process only.

        The mIoU is the mean over the classes that occur in the labels. Detectron2 0.5 also divides by the classes that
        are only predicted, as if their IoU were 0; later versions do not.

        Raises:
            ReclipError: no label contains any class; or all contain only 0 and 255, and no preparation program has
                checked them.
        """
        ids = set().union(*comm.all_gather(self._label_ids)) if self._distributed else self._label_ids
        check_label_ids(ids, self._labels)
        self._logger = _SILENT  # so that Detectron2 does not log its own mean
        results = super().evaluate()
        if results is not None:
            scores = results["sem_seg"]
            by_class = {key.removeprefix("IoU-"): value for key, value in scores.items() if key.startswith("IoU-")}
            scores["mIoU"] = float(np.nanmean(list(by_class.values())))
            words = ", ".join(f"{name} {value:.2f}" for name, value in by_class.items())
            logger.info("%s: IoU per class: %s", self._dataset_name, words)
        return results


def check_label_ids(ids: set[int], labels: DatasetLabels) -> None:
    """Check the ids that occur in all labels of a data set.

    Labels with only 0 and 255 show one class and ignored pixels, or are binary masks; the labels do not tell which. If
    a preparation program has written them (``reclip_protocol`` and no ``reclip_own_labels`` in the metadata), they are
    trusted, with one line in the log; otherwise they raise an error.

    Raises:
        ReclipError: see above; or there is only the ignored id.
    """
    name = labels.dataset_name
    if ids == {labels.ignore_label}:
        raise ReclipError(f"the labels of {name} contain no class, only ignored pixels")
    if labels.num_classes < 2 or ids != {0, 255} or labels.ignore_label != 255:
        return
    only = f"the labels of {name} contain only 0 and 255: the class {labels.class_names[0]} and ignored pixels"
    metadata = MetadataCatalog.get(name)
    if hasattr(metadata, "reclip_protocol") and not metadata.get("reclip_own_labels", False):
        logger.warning("%s; the mean IoU is that of this one class", only)
        return
    raise ReclipError(f"{only}, or they are binary masks: write PNGs of class ids, or add labels with a second class")


def check_own_labels(dataset_name: str) -> None:
    """Read all labels that no preparation program has checked (``reclip_own_labels`` in the metadata).

    Wrong labels are thus found before hours of prediction. The classes that occur are logged.

    Raises:
        ReclipError: a label is not a map of class ids with its image's size, see
            :func:`~reclip_d2.evaluation.label_files.read_label_file`; or all of them look like binary masks.
    """
    if not MetadataCatalog.get(dataset_name).get("reclip_own_labels", False):
        return
    labels, records = DatasetLabels(dataset_name), DatasetCatalog.get(dataset_name)
    found: set[int] = set()
    for record in records:
        found |= set(np.unique(labels.read(record, read_geometry(record["file_name"]).upright)).tolist())
    check_label_ids(found, labels)
    names = [name for k, name in enumerate(labels.class_names) if k in found]
    logger.info("%s: %d labels; classes that occur: %s", dataset_name, len(records), ", ".join(names))
