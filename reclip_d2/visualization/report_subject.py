"""What a bias report is about, besides the models: the data set and the scenes that are drawn.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Scene:
    """One drawn scene."""

    image_id: str
    image: np.ndarray
    """``(H, W, 3)`` uint8."""
    truth: np.ndarray | None
    """``(H, W)`` int64, if it is labelled."""


@dataclass
class ReportSubject:
    """What the report is about, besides the models."""

    dataset: str
    protocol: str
    images: int
    class_names: list[str]
    colors: np.ndarray
    """``(C, 3)`` uint8."""
    ignore_label: int
    labelled: bool
    bin_width: float
    min_object_area: int
    min_bin_objects: int
    scenes: list[Scene]
