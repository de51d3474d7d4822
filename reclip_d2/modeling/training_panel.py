"""Images of a training step for TensorBoard: input, label maps, bias map.

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.data.colors import class_colors, colorize_labels


def label_panel(image: Tensor, label_maps: list[Tensor], num_classes: int) -> np.ndarray:
    """Input and label maps side by side, for TensorBoard.

    Args:
        image: ``(3, H, W)`` RGB in [0, 255].
        label_maps: each ``(H, W)`` or smaller (resized by nearest neighbour), int64; 255 is drawn black.
        num_classes: C, for the palette.

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
        bias: M_b ``(h, w, C)``; the map shows the class with the largest bias.

    Returns:
        ``(3, H, 3 * W)`` uint8.
    """
    return label_panel(image, [logits.argmax(0), bias.argmax(-1)], logits.shape[0])
