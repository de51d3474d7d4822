"""Colour augmentation, from Detectron2's own transforms."""

from __future__ import annotations

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList


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
