"""Pseudo labels from files: masks of unlabelled images that another system has predicted, to train a student with.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.data.mask_files import NO_CLASS, MaskFiles, ids_of_names, images_of
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, display_path

ARCHITECTURE = "MaskFolder"
"""Value of ``MODEL.TEACHER.META_ARCHITECTURE`` for masks from files."""


class PseudoLabels:
    """Masks of images, without the pixels of which their system is not confident."""

    def __init__(self, masks: MaskFiles, confidence: MaskFiles | None = None, threshold: float = 0.0) -> None:
        """
        Args:
            masks: with the data set's class ids.
            confidence: grey PNGs of 8 or 16 bits with the masks' names; black is 0, white is 1.
            threshold: pixels of a lower confidence have no label.
        """
        self.masks = masks
        self.confidence = confidence
        self.threshold = threshold

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PseudoLabels | None:
        """The pseudo labels of ``MODEL.TEACHER.MASKS``, None for another teacher.

        Raises:
            ReclipError: a folder or the file of names cannot be used.
        """
        if cfg.MODEL.META_ARCHITECTURE != "Distillation" or cfg.MODEL.TEACHER.META_ARCHITECTURE != ARCHITECTURE:
            return None
        keys = cfg.MODEL.TEACHER.MASKS
        class_names = class_names_from_config(cfg)
        ids: Sequence[int] = range(len(class_names))
        if keys.NAMES:
            ids = ids_of_names(read_class_file(keys.NAMES, "MODEL.TEACHER.MASKS.NAMES").model_classes, class_names)
        masks = MaskFiles(keys.FOLDER, ids=ids, suffix=keys.SUFFIX, size_rule="nearest")
        confidence = MaskFiles(keys.CONFIDENCE, suffix=keys.SUFFIX, size_rule="nearest") if keys.CONFIDENCE else None
        return cls(masks, confidence, keys.MIN_CONFIDENCE)

    def read(self, image: StrPath, size: tuple[int, int]) -> np.ndarray:
        """The pseudo labels of an image.

        Args:
            image: the image's file, which is not opened.
            size: (H, W) of the upright image; masks of another size are resized to the nearest pixel.

        Returns:
            ``(H, W)`` int64: class ids, or :data:`~reclip_d2.data.mask_files.NO_CLASS`.

        Raises:
            ReclipError: a file is missing or cannot be read, or an id has no class.
        """
        labels = self.masks.read(image, size)
        if self.confidence is None:
            return labels
        pixels, _ = self.confidence.pixels(image, size)
        white = 255 if pixels.dtype == np.uint8 else 65535
        return np.where(pixels < self.threshold * white, NO_CLASS, labels)

    def check(self, datasets: Sequence[str], others: Sequence[str] = ()) -> None:
        """Check that each training image has a mask, and that none of these files is a label of a data set.

        Files are compared by their inode, so links are found; copies of labels are not.

        Args:
            datasets: registered names, ``DATASETS.TRAIN``.
            others: further registered names whose labels must not be used: ``DATASETS.TEST``, the user's own.

        Raises:
            ReclipError: a file is missing; or a mask is a label: training uses none.
        """
        labels = _label_files([*datasets, *(f"{name}_labelled" for name in datasets), *others])
        for name in datasets:
            images = images_of(DatasetCatalog.get(name))
            self.masks.check(images)
            if self.confidence is not None:
                self.confidence.check(images)
            for image in images:
                mask = self.masks.path(image)
                if mask is not None and _file_id(mask) in labels:
                    raise ReclipError(
                        f"MODEL.TEACHER.MASKS.FOLDER has labels of a data set ({display_path(mask)}): training uses no"
                        " labels; give the folder of a system's predictions"
                    )


def _file_id(path: StrPath) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _label_files(datasets: Iterable[str]) -> set[tuple[int, int]]:
    """The label files of those data sets that are registered; they are not opened."""
    known = set(DatasetCatalog.list())
    paths = [
        record["sem_seg_file_name"]
        for name in dict.fromkeys(datasets)
        if name in known
        for record in DatasetCatalog.get(name)
        if record.get("sem_seg_file_name")
    ]
    return {_file_id(path) for path in paths if os.path.exists(path)}
