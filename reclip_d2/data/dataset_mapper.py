"""Mappers from data set records to model inputs. Neither ever opens a label."""

from __future__ import annotations

import copy
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList

from reclip_d2.data.images import check_aspect, read_image
from reclip_d2.data.mask_files import NO_CLASS
from reclip_d2.data.pseudo_labels import PseudoLabels
from reclip_d2.data.tiling import Tiling

LABEL_KEYS = (
    "sem_seg_file_name",
    "sem_seg_orientation",
    "annotations",
    "segments_info",
    "pan_seg_file_name",
    "label_file_name",
)


def check_unlabelled(record: dict[str, Any]) -> None:
    """Raise :class:`AssertionError` if a training record has an annotation."""
    if found := [key for key in LABEL_KEYS if record.get(key)]:
        raise AssertionError(f"a training record of {record['file_name']} carries a label: {found}")


class UnlabelledDatasetMapper:
    """Map a record to ``{"image": (3, H, W) uint8 RGB tensor, "hypothesis": (|H|,) int64, ...}``.

    The record's other entries (file name, size, image id) pass through. ``crop_hypothesis``, a function of the image's
    (H, W), the transforms and the crop's (H, W), replaces ``hypothesis``; see ``reclip_d2.hypothesis.crop_aware``.
    Records with an annotation are rejected, so "unsupervised" is checked where the data enters. With a teacher's masks,
    ``pseudo_labels`` ``(H, W)`` int64 are the image's mask after the same augmentation, -1 without a class.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        refuse_labels: bool = True,
        tiling: Tiling | None = None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """
        Args:
            augmentations: applied to the image, in order.
            refuse_labels: raise for a record with an annotation (training); otherwise ignore the annotation (test: the
                evaluator reads the label itself).
            tiling: images that it cuts into tiles keep their size; None augments all images.
            pseudo_labels: masks of a teacher that are files.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.refuse_labels = refuse_labels
        self.tiling = tiling
        self.pseudo_labels = pseudo_labels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        return {
            "augmentations": build_train_augmentations(cfg) if is_train else build_test_augmentations(cfg),
            "refuse_labels": is_train,
            "pseudo_labels": PseudoLabels.from_config(cfg) if is_train else None,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """See the class. The input is not modified."""
        if self.refuse_labels:
            check_unlabelled(record)
        record = {key: copy.copy(value) for key, value in record.items() if key not in LABEL_KEYS}
        image = read_image(record["file_name"])
        check_aspect(record["file_name"], image.shape[:2])
        record.setdefault("height", image.shape[0])
        record.setdefault("width", image.shape[1])
        inputs = T.AugInput(image)
        tiled = self.tiling is not None and self.tiling.applies_to((record["height"], record["width"]))
        transforms = T.TransformList([]) if tiled else self.augmentations(inputs)
        record["image"] = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if self.pseudo_labels is not None:
            mask = self.pseudo_labels.read(record["file_name"], image.shape[:2])
            record["pseudo_labels"] = _transformed(mask, transforms)
        if crop_hypothesis := record.pop("crop_hypothesis", None):
            record["hypothesis"] = crop_hypothesis(image.shape[:2], transforms, inputs.image.shape[:2])
        if "hypothesis" in record:
            record["hypothesis"] = torch.as_tensor(record["hypothesis"], dtype=torch.int64)
        return record


def _transformed(mask: np.ndarray, transforms: T.TransformList) -> torch.Tensor:
    """Class ids after the transforms of their image, int64; -1 for no class."""
    # Detectron2 resizes uint8 to the nearest pixel's centre, other types to the pixel on its left.
    dtype, none = (np.uint8, 255) if mask.max(initial=0) < 255 else (np.float32, NO_CLASS)
    moved = transforms.apply_segmentation(np.where(mask == NO_CLASS, none, mask).astype(dtype))
    labels = torch.from_numpy(np.array(moved, dtype=np.int64))
    return labels.masked_fill(labels == none, NO_CLASS)


def build_test_mapper(cfg: CfgNode) -> UnlabelledDatasetMapper:
    """The mapper of a test loader, for :class:`~reclip_d2.inference.DatasetPredictor`."""
    return UnlabelledDatasetMapper(cfg, is_train=False, tiling=Tiling.from_config(cfg))


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
        for part in self.parts:  # each takes the output of the one before it
            transforms.append(part.get_transform(image))
            image = transforms[-1].apply_image(image)
        return TransformList(transforms)


class OpenCVResize(T.Augmentation):
    """Resize as the public code of ReCLIP++ does: OpenCV's bilinear interpolation, which takes four pixels and does not
    smooth first (Pillow, the default, averages all pixels that shrink into one)."""

    def __init__(self, short_side: int, long_side: int) -> None:
        """
        Args:
            short_side: of the result, in pixels, unless the long side would exceed ``long_side``.
        """
        super().__init__()
        self.short_side = short_side
        self.long_side = long_side

    def get_transform(self, image: np.ndarray) -> Transform:
        """Transform for an ``(H, W, 3)`` uint8 image."""
        height, width = image.shape[:2]
        scale = min(self.long_side / max(height, width), self.short_side / min(height, width))
        return _OpenCVResizeTransform(int(height * scale + 0.5), int(width * scale + 0.5))


class _OpenCVResizeTransform(Transform):
    """See :class:`OpenCVResize`."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (width, height)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return cv2.resize(img, self.size, interpolation=cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return cv2.resize(segmentation, self.size, interpolation=cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        raise NotImplementedError("test images have no coordinates")


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
    if cfg.INPUT.RESIZE_TEST == "opencv":
        return [OpenCVResize(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
    sizes = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    return [T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST)]
