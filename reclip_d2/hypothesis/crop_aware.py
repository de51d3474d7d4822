"""Hypotheses of training crops in place of whole images (``HYPOTHESIS.CROP_AWARE``); not in the papers.

Eq. (6) over the windows whose centres are in the crop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data.transforms import TransformList

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.rules import hypothesis_from_windows
from reclip_d2.hypothesis.windows import crop_windows


@dataclasses.dataclass(frozen=True)
class CropHypothesis:
    """Entry ``crop_hypothesis`` of a training record, called by ``UnlabelledDatasetMapper`` for each crop.

    Attributes:
        image_id: id of the image, for messages.
        top1: best class of each window of the image.
        threshold: t of Eq. (6).
        window_ratio: r of Eq. (6).
    """

    image_id: str
    top1: Sequence[int]
    threshold: float
    window_ratio: float

    def __call__(self, image_size: tuple[int, int], transforms: TransformList, crop_size: tuple[int, int]) -> list[int]:
        """Eq. (6) over the windows in the crop, or over all windows if the crop has none: class ids, ascending.

        Args:
            image_size: (H, W) of the original image.
            transforms: transforms from the image to the crop.
            crop_size: (H, W) of the crop.

        Raises:
            ReclipError: the number of windows does not match an image of this size.
        """
        inside = windows_inside(crop_windows(*image_size, self.window_ratio), transforms, crop_size)
        if len(self.top1) != len(inside):
            raise ReclipError(
                f"the hypothesis file has {len(self.top1)} windows for image {self.image_id!r}, but the image has"
                f" {len(inside)}: remove the file, and the next run computes it again"
            )
        seen = [k for k, kept in zip(self.top1, inside, strict=True) if kept]
        return hypothesis_from_windows(seen or self.top1, self.threshold)


def windows_inside(windows: torch.Tensor, transforms: TransformList, size: tuple[int, int]) -> np.ndarray:
    """Which windows have their centre in the augmented image, including its borders, so that flips change nothing.

    Args:
        windows: ``(N, 4)`` boxes in the original image.
        transforms: transforms from the original to the augmented image.
        size: (H, W) of the augmented image.

    Returns:
        ``(N,)`` bool.
    """
    boxes = windows.numpy().astype(np.float64)
    x, y = transforms.apply_coords((boxes[:, :2] + boxes[:, 2:]) / 2).T
    return (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])
