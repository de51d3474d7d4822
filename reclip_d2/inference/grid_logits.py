"""Logits of an image on the patch grid, resized to pixels on demand.

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.layers import upsample_argmax
from reclip_d2.modeling.postprocessing import upsample_labels

BYTES = 4  # per logit, float32


@functools.lru_cache(maxsize=8)
def resize_matrix(length: int, steps: tuple[tuple[int, int], ...]) -> Tensor:
    """Matrix ``(pixels, length)`` of a sequence of resizes along one axis of a window's logits.

    Args:
        length: number of patches.
        steps: for each bilinear resize (align_corners=False) its output size, and how many of the first positions are
            kept.
    """
    rows = torch.eye(length)[None]  # (1, channels, positions): one channel per patch
    for size, kept in steps:
        if rows.shape[-1] != size:
            rows = F.interpolate(rows, size=size, mode="linear", align_corners=False)
        rows = rows[..., :kept]
    return rows[0].T.contiguous()


@dataclasses.dataclass(frozen=True)
class GridLogits:
    """Logits of an image or window on the patch grid, from which any rows of its ``(C, H, W)`` logits can be computed.

    Attributes:
        logits: ``(C, h, w)``.
        padded_size: (height, width) of the padded network input.
        network_size: (height, width) of the image in it, at the top left.
        size: (height, width) of the output.
        stretch: resize the whole grid, with its padding, to the image in the input, and that to the output, as the
            public code of ReCLIP++ does.
    """

    logits: Tensor
    padded_size: tuple[int, int]
    network_size: tuple[int, int]
    size: tuple[int, int]
    stretch: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.logits)

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits ``(C, stop - start, width)`` of some rows of the output, as computed by
        :func:`~reclip_d2.modeling.postprocessing.upsample_logits`: if there is padding, resized to the network's input,
        cropped, and resized to the output size; otherwise resized once."""
        down, across = (self._resize(axis).to(self.logits) for axis in (0, 1))
        # Rows first: few of them are needed, which makes the product with the columns cheap.
        return torch.einsum("rh,chw->crw", down[start:stop], self.logits) @ across.T

    def labels(self, memory: int) -> Tensor | None:
        """Labels ``(H, W)`` int64 by :func:`~reclip_d2.modeling.postprocessing.upsample_labels`; None if that needs two
        resizes, and more than ``memory`` bytes for logits."""
        pixels = self.padded_size[0] * self.padded_size[1] + self.size[0] * self.size[1]
        one_resize = self.network_size == self.size or (self.network_size == self.padded_size and not self.stretch)
        if not one_resize and self.num_classes * pixels * BYTES > memory:
            return None
        if self.stretch and self.network_size != self.size:
            inside = F.interpolate(self.logits[None], self.network_size, mode="bilinear", align_corners=False)
            return upsample_argmax(inside, self.size)[0]
        if self.stretch:
            return upsample_argmax(self.logits[None], self.size)[0]
        return upsample_labels(self.logits[None], self.padded_size, self.network_size, self.size)[0]

    def _resize(self, axis: int) -> Tensor:
        last = (self.size[axis], self.size[axis])
        padding = (self.padded_size[axis], self.network_size[axis])
        if self.stretch:
            padding = (self.network_size[axis], self.network_size[axis])
        elif self.padded_size == self.network_size:
            return resize_matrix(self.logits.shape[1 + axis], (last,))
        steps = (padding, last)
        return resize_matrix(self.logits.shape[1 + axis], steps)


def bilinear_taps(length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Taps of a bilinear resize (align_corners=False) of one axis from ``length`` to ``size``.

    Returns:
        for each output position its two input positions ``(size,)`` int64, and the weight of the second ``(size,)``
        float32.
    """
    position = ((torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5).clamp(min=0)
    first = position.long()
    return first, (first + 1).clamp(max=length - 1), (position - first).float()


def rows_in(memory: int, num_classes: int, width: int) -> int:
    """Number of rows whose logits fit in ``memory`` bytes, at least one."""
    return max(1, memory // (BYTES * num_classes * width))
