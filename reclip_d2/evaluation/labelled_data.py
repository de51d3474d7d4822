"""Training data with labels, only for linear probing: the unsupervised path never imports this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from reclip_d2.data.classes import check_registered, class_names_of
from reclip_d2.data.dataset_mapper import build_train_augmentations
from reclip_d2.data.images import read_image
from reclip_d2.data.index_images import PLAIN, Palette
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import check_no_background, read_label_file


class LabelledDatasetMapper:
    """Map a labelled record to ``{"image": (3, H, W) uint8 RGB tensor, "sem_seg": (H, W) int64 tensor, ...}``.

    The augmentations are those of the unsupervised training; the label follows the image. Pixels of the data set's
    ignore label become -1.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        num_classes: int,
        ignore_label: int = 255,
        palette: Palette = PLAIN,
    ) -> None:
        """
        Args:
            augmentations: applied to image and label, in order.
            num_classes: labels are 0 to num_classes - 1, or ignore_label.
            palette: what the colours of palette labels mean.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.palette = palette

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int, ignore_label: int, palette: Palette = PLAIN) -> dict[str, Any]:
        return {
            "augmentations": build_train_augmentations(cfg),
            "num_classes": num_classes,
            "ignore_label": ignore_label,
            "palette": palette,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """See the class.

        Raises:
            ReclipError: image or label cannot be read, or the label is not a map of class ids with the image's size.
        """
        image = read_image(record["file_name"])
        ids = read_label_file(
            record["sem_seg_file_name"],
            self.num_classes,
            self.ignore_label,
            image.shape[:2],
            self.palette,
            record.get("sem_seg_orientation", 1),
        )
        # Detectron2 resizes uint8 to the nearest pixel's centre, other types to the pixel on its left.
        dtype, unlabelled = (np.uint8, 255) if self.num_classes <= 255 else (np.float32, -1)
        inputs = T.AugInput(image, sem_seg=np.where(ids == self.ignore_label, unlabelled, ids).astype(dtype))
        self.augmentations(inputs)
        sem_seg = torch.from_numpy(np.array(inputs.sem_seg, dtype=np.int64))
        return {
            "file_name": record["file_name"],
            "image": torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1))),
            "sem_seg": sem_seg.masked_fill(sem_seg == unlabelled, -1),
        }


def labelled_records(datasets: Sequence[str], class_names: list[list[str]]) -> list[dict[str, Any]]:
    """Records of registered data sets with their labels, to train a probe with.

    Args:
        class_names: the model's classes.

    Raises:
        ReclipError: a data set is unknown, empty, without labels, or has another class list.
    """
    records = []
    for name in datasets:
        check_registered(name)
        if class_names_of(name) != class_names:
            raise ReclipError(f"data set {name!r} has another class list than the model: check LINEAR_PROBE.DATASETS")
        found = DatasetCatalog.get(name)
        if not found or not all(record.get("sem_seg_file_name") for record in found):
            raise ReclipError(
                f"data set {name!r} has no labels to train a probe with: name another in LINEAR_PROBE.DATASETS"
            )
        check_no_background(name, "LINEAR_PROBE.DATASETS")
        records += found
    return records


def probe_datasets(cfg: CfgNode) -> tuple[str, ...]:
    """``LINEAR_PROBE.DATASETS``; by default the labelled versions of ``DATASETS.TRAIN``: ``voc20_train_labelled``."""
    return tuple(cfg.LINEAR_PROBE.DATASETS) or tuple(f"{name}_labelled" for name in cfg.DATASETS.TRAIN)
