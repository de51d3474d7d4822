"""Mappers from data set records to model inputs. Neither ever opens a label."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList

from reclip_d2.data.images import check_aspect, read_image
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.rules import hypothesis_from_windows
from reclip_d2.hypothesis.windows import crop_windows

LABEL_KEYS = (
    "sem_seg_file_name",
    "sem_seg_orientation",
    "annotations",
    "segments_info",
    "pan_seg_file_name",
    "label_file_name",
)


class UnlabelledDatasetMapper:
    """Map a record to ``{"image": (3, H, W) uint8 RGB tensor, "hypothesis": (|H|,) int64, ...}``.

    The record's other entries (file name, size, image id) pass through. A record that carries an annotation is
    refused: the claim "unsupervised" is checked where the data enters, not promised.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        refuse_labels: bool = True,
        window_ratio: float = 1 / 6,
    ) -> None:
        """
        Args:
            augmentations: applied to the image, in order.
            refuse_labels: raise for a record with an annotation (training); otherwise ignore it (test, where the
                evaluator reads the label by itself).
            window_ratio: r of Eq. (6), for records with ``window_classes`` and ``window_threshold`` (t), whose
                hypothesis is that of the crop and not of the image.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.refuse_labels = refuse_labels
        self.window_ratio = window_ratio

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        return {
            "augmentations": build_train_augmentations(cfg) if is_train else build_test_augmentations(cfg),
            "refuse_labels": is_train,
            "window_ratio": cfg.HYPOTHESIS.WINDOW_RATIO,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """See the class. The input is not changed."""
        if self.refuse_labels and (found := [key for key in LABEL_KEYS if record.get(key)]):
            raise AssertionError(f"a training record of {record['file_name']} carries a label: {found}")
        record = {key: copy.copy(value) for key, value in record.items() if key not in LABEL_KEYS}
        image = read_image(record["file_name"])
        check_aspect(record["file_name"], image.shape[:2])
        record.setdefault("height", image.shape[0])
        record.setdefault("width", image.shape[1])
        inputs = T.AugInput(image)
        transforms = self.augmentations(inputs)
        record["image"] = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        threshold = record.pop("window_threshold", 0.0)
        if window_classes := record.pop("window_classes", None):
            windows = crop_windows(image.shape[0], image.shape[1], self.window_ratio)
            inside = windows_inside(windows, transforms, inputs.image.shape[:2])
            if len(window_classes) != len(inside):
                raise ReclipError(
                    f"the hypothesis file's line of image {record['image_id']!r} has {len(window_classes)} windows, and"
                    f" the image has {len(inside)}: remove the file to have it made anew"
                )
            seen = [k for k, kept in zip(window_classes, inside, strict=True) if kept]
            record["hypothesis"] = hypothesis_from_windows(seen or window_classes, threshold)
        if "hypothesis" in record:
            record["hypothesis"] = torch.as_tensor(record["hypothesis"], dtype=torch.int64)
        return record


def windows_inside(windows: torch.Tensor, transforms: T.TransformList, size: tuple[int, int]) -> np.ndarray:
    """Which windows have their centre in the augmented image, or on its border: so a flip changes nothing.

    Args:
        windows: ``(N, 4)`` boxes in the original image.
        transforms: what made the augmented image of it.
        size: (H, W) of the augmented image.

    Returns:
        ``(N,)`` bool.
    """
    boxes = windows.numpy().astype(np.float64)
    x, y = transforms.apply_coords((boxes[:, :2] + boxes[:, 2:]) / 2).T
    return (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])


class ColorJitter(T.Augmentation):
    """Random brightness, contrast and saturation, each by a factor drawn from [1 - strength, 1 + strength]."""

    def __init__(self, strength: float) -> None:
        """
        Args:
            strength: in (0, 1).
        """
        super().__init__()
        low, high = 1 - strength, 1 + strength
        self.parts = [T.RandomBrightness(low, high), T.RandomContrast(low, high), T.RandomSaturation(low, high)]

    def get_transform(self, image: np.ndarray) -> Transform:
        """Transform for an ``(H, W, 3)`` RGB image."""
        transforms = []
        for part in self.parts:  # each works on what the one before it gave
            transforms.append(part.get_transform(image))
            image = transforms[-1].apply_image(image)
        return TransformList(transforms)


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
