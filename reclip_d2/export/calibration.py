"""Images that set the ranges of INT8 activations: the user's own, without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from reclip_d2.data.dataset_mapper import build_test_augmentations
from reclip_d2.data.image_folder import find_images
from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError
from reclip_d2.inference.predictor import resized_pixels


@dataclasses.dataclass(frozen=True)
class CalibrationImages:
    """Images as the exported graph gets them, read and resized each time they are iterated over.

    Attributes:
        paths: the images, in a fixed order.
        found: number of images that they were chosen from.
        augmentations: the model's resize.
    """

    paths: tuple[Path, ...]
    found: int
    augmentations: tuple[T.Augmentation, ...] = ()

    @classmethod
    def choose(cls, source: str, count: int, cfg: CfgNode, size: tuple[int, int] | None = None) -> CalibrationImages:
        """Choose ``count`` images at equal steps of the sorted names, so that each subfolder is represented.

        Args:
            source: a folder, an image, a glob or a list, as for :func:`~reclip_d2.data.image_folder.find_images`.
            count: largest number of images.
            cfg: config whose ``INPUT.*_TEST`` resizes images.
            size: (H, W) of a graph for one size: images are resized to it, which may change their proportions.

        Raises:
            ReclipError: there is no image.
        """
        if count < 1:
            raise ReclipError(f"--calibration-images {count}: give at least 1")
        try:
            images = find_images([source]).images
        except ReclipError as error:
            raise ReclipError(f"--calibrate: {error}") from error
        chosen = [images[k * len(images) // count] for k in range(count)] if count < len(images) else images
        augmentations = build_test_augmentations(cfg) if size is None else [T.Resize(size)]
        return cls(tuple(image.path for image in chosen), len(images), tuple(augmentations))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Pixels of an image, resized: ``(3, H, W)`` uint8.

        Raises:
            ReclipError: the file cannot be read.
        """
        return resized_pixels(read_image(self.paths[index]), T.AugmentationList(list(self.augmentations)))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
