"""Logits of an image on the patch grid, resized to pixels when they are wanted.

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.modeling.postprocessing import upsample_labels

BYTES = 4  # of a logit, float32


@functools.lru_cache(maxsize=8)
def resize_matrix(length: int, steps: tuple[tuple[int, int], ...]) -> Tensor:
    """Matrix ``(pixels, length)`` of what happens to one axis of a window's logits: resizes, one after the other.

    Args:
        length: patches.
        steps: for each bilinear resize (align_corners=False) the size to resize to, and how many of the first positions
            are kept.
    """
    rows = torch.eye(length)[None]  # (1, channels, positions): each patch by itself
    for size, kept in steps:
        if rows.shape[-1] != size:
            rows = F.interpolate(rows, size=size, mode="linear", align_corners=False)
        rows = rows[..., :kept]
    return rows[0].T.contiguous()


@dataclasses.dataclass(frozen=True)
class GridLogits:
    """Logits of an image, or of a window of one, on the patch grid: at its pixels they would be (C, H, W).

    Attributes:
        logits: ``(C, h, w)``.
        padded_size: (height, width) of the padded network input.
        network_size: (height, width) of the image in it, at the top left.
        size: (height, width) wanted.
    """

    logits: Tensor
    padded_size: tuple[int, int]
    network_size: tuple[int, int]
    size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        return len(self.logits)

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits ``(C, stop - start, width)`` of some of the rows at the wanted size, as
        :func:`~reclip_d2.modeling.postprocessing.upsample_logits` gives them: where there is padding, up to the
        network's input, the padding cropped off, and then to the wanted size; otherwise at once."""
        down, across = (self._resize(axis).to(self.logits) for axis in (0, 1))
        # Rows first: few of them are wanted, and the product with the columns is then a small one.
        return torch.einsum("rh,chw->crw", down[start:stop], self.logits) @ across.T

    def labels(self, memory: int) -> Tensor | None:
        """Labels ``(H, W)`` int64 by :func:`~reclip_d2.modeling.postprocessing.upsample_labels`; None if that would
        take more than ``memory`` bytes for logits, where two resizes are needed."""
        pixels = self.padded_size[0] * self.padded_size[1] + self.size[0] * self.size[1]
        one_resize = self.network_size in (self.padded_size, self.size)
        if not one_resize and self.num_classes * pixels * BYTES > memory:
            return None
        return upsample_labels(self.logits[None], self.padded_size, self.network_size, self.size)[0]

    def _resize(self, axis: int) -> Tensor:
        last = (self.size[axis], self.size[axis])
        padding = (self.padded_size[axis], self.network_size[axis])
        steps = (last,) if self.padded_size == self.network_size else (padding, last)
        return resize_matrix(self.logits.shape[1 + axis], steps)


def bilinear_taps(length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a bilinear resize (align_corners=False) of one axis from ``length`` to ``size`` reads: for each position the
    two that it lies between ``(size,)`` int64, and the share of the second ``(size,)`` float32."""
    position = ((torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5).clamp(min=0)
    first = position.long()
    return first, (first + 1).clamp(max=length - 1), (position - first).float()


def rows_in(memory: int, num_classes: int, width: int) -> int:
    """Rows of a band whose logits fit in ``memory`` bytes, at least one."""
    return max(1, memory // (BYTES * num_classes * width))
