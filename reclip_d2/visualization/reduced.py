"""Reduced copies of images and labels, for pages.

Shape letters: (H, W) size of an image in pixels, (h, w) of its reduced copy.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

LONGEST_SIDE = 1600
"""Longest side of pictures on the browser page; larger ones only take longer."""


def reduced_size(size: tuple[int, int], longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """(h, w) of a copy of an image of (H, W) pixels, with a longer side of at most ``longest``."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def reduce_image(image: np.ndarray, longest: int = LONGEST_SIDE) -> np.ndarray:
    """A copy ``(h, w, 3)`` uint8 of an image ``(H, W, 3)`` uint8; see :func:`reduced_size`."""
    height, width = reduced_size(image.shape[:2], longest)
    if (height, width) == image.shape[:2]:
        return image
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small)


def reduce_labels(labels: np.ndarray, longest: int = LONGEST_SIDE) -> np.ndarray:
    """Labels ``(h, w)`` for :func:`reduce_image`'s copy: those at the centre of each of its pixels."""
    height, width = reduced_size(labels.shape, longest)
    if (height, width) == labels.shape:
        return labels
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[rows[:, None], columns]
