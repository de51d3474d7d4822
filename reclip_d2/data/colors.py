"""Colours of classes, and label maps as pictures.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import colorsys

import numpy as np

# The golden ratio's conjugate spreads any number of hues evenly.
_HUE_STEP = 0.61803398875


def class_colors(num_classes: int) -> np.ndarray:
    """Distinct colours, ``(C, 3)`` uint8, for data sets without a palette."""

    def color(k: int) -> list[int]:
        saturation, value = 0.55 + 0.4 * (k % 2), 0.95 - 0.15 * (k % 3)
        return [round(255 * v) for v in colorsys.hsv_to_rgb(k * _HUE_STEP % 1, saturation, value)]

    return np.array([color(k) for k in range(num_classes)], dtype=np.uint8)


def colorize_labels(labels: np.ndarray, colors: np.ndarray, ignore_label: int = 255) -> np.ndarray:
    """Label map ``(H, W)`` as a picture ``(H, W, 3)`` uint8; the ignored label is black."""
    table = np.zeros((256, 3), dtype=np.uint8) if len(colors) <= 256 else np.zeros((len(colors) + 1, 3), np.uint8)
    table[: len(colors)] = colors
    if ignore_label < len(table) and ignore_label >= len(colors):
        table[ignore_label] = 0
    return table[labels]
