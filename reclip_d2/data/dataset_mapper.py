"""Mappers from data set records to model inputs. Neither ever opens a label."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from reclip_d2.data.color_augmentation import ColorJitter
from reclip_d2.data.images import read_image

LABEL_KEYS = ("sem_seg_file_name", "annotations", "segments_info", "pan_seg_file_name", "label_file_name")


class UnlabelledDatasetMapper:
    """Map a record to ``{"image": (3, H, W) uint8 RGB tensor, "hypothesis": (|H|,) int64, ...}``.

    The record's other entries (file name, size, image id) pass through. A record that carries an annotation is
    refused: the claim "unsupervised" is checked where the data enters, not promised.
    """

    @configurable
    def __init__(self, *, augmentations: list[T.Augmentation], refuse_labels: bool = True) -> None:
        """
        Args:
            augmentations: applied to the image, in order.
            refuse_labels: raise for a record with an annotation (training); otherwise ignore it (test, where the
                evaluator reads the label by itself).
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.refuse_labels = refuse_labels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        return {
            "augmentations": build_train_augmentations(cfg) if is_train else build_test_augmentations(cfg),
            "refuse_labels": is_train,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """See the class. The input is not changed."""
        if self.refuse_labels and (found := [key for key in LABEL_KEYS if record.get(key)]):
            raise AssertionError(f"a training record of {record['file_name']} carries a label: {found}")
        record = {key: copy.copy(value) for key, value in record.items() if key not in LABEL_KEYS}
        image = read_image(record["file_name"])
        record.setdefault("height", image.shape[0])
        record.setdefault("width", image.shape[1])
        inputs = T.AugInput(image)
        self.augmentations(inputs)
        record["image"] = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if "hypothesis" in record:
            record["hypothesis"] = torch.as_tensor(record["hypothesis"], dtype=torch.int64)
        return record


def build_train_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize, random crop, flip, and (off by default) colour."""
    augmentations: list[T.Augmentation] = [
        T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    if cfg.INPUT.COLOR_JITTER > 0:
        augmentations.append(ColorJitter(cfg.INPUT.COLOR_JITTER))
    if cfg.INPUT.RANDOM_FLIP != "none":
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    return augmentations


def build_test_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize only; ``INPUT.MIN_SIZE_TEST 0`` keeps the image as it is."""
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        return []
    sizes = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    return [T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST)]
