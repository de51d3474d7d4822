"""Pictures of label maps and bias maps.

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The golden ratio's conjugate spreads any number of hues evenly.
_HUE_STEP = 0.61803398875


def class_colors(num_classes: int) -> np.ndarray:
    """Colours that differ, ``(C, 3)`` uint8, for data sets without a palette of their own."""

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


def label_panel(image: Tensor, label_maps: list[Tensor], num_classes: int) -> np.ndarray:
    """Input and label maps side by side, for TensorBoard.

    Args:
        image: ``(3, H, W)`` RGB in [0, 255].
        label_maps: each ``(H, W)`` or smaller (resized by nearest neighbour), int64; 255 is black.

    Returns:
        ``(3, H, W * (1 + len(label_maps)))`` uint8.
    """
    size = (image.shape[-2], image.shape[-1])
    colors = class_colors(num_classes)

    def draw(labels: Tensor) -> Tensor:
        large = F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].long().cpu().numpy()
        return torch.from_numpy(colorize_labels(large, colors)).permute(2, 0, 1)

    return torch.cat([image.cpu().to(torch.uint8), *map(draw, label_maps)], dim=2).numpy()


def training_panel(image: Tensor, logits: Tensor, bias: Tensor) -> np.ndarray:
    """Input, prediction and bias map side by side, for TensorBoard.

    Args:
        image: ``(3, H, W)`` RGB in [0, 255].
        logits: mask logits ``(C, h, w)``.
        bias: M_b ``(h, w, C)``; drawn is the class of the largest bias.

    Returns:
        ``(3, H, 3 * W)`` uint8.
    """
    return label_panel(image, [logits.argmax(0), bias.argmax(-1)], logits.shape[0])
