"""Overlapping windows, and the average of their logits at the pixels, in bands of rows.

Shape letters: C classes, (H, W) size of the whole image in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.data.tiling import window_starts
from reclip_d2.inference.grid_logits import BYTES, GridLogits, bilinear_taps, rows_in
from reclip_d2.layers import upsample_argmax


def uniform_weights(starts: Sequence[int], length: int) -> list[Tensor]:
    """Weights ``(length,)`` of the windows along one axis for a plain mean: 1."""
    return [torch.ones(length) for _ in starts]


def ramp_weights(starts: Sequence[int], length: int) -> list[Tensor]:
    """Weights ``(length,)`` of the windows along one axis: 1, with linear ramps where windows overlap.

    They are positive everywhere, and 1 at the image's border. Where two windows overlap by m pixels, the i-th of these
    pixels has weights (i + 1/2) / m and 1 - (i + 1/2) / m.
    """
    position = torch.arange(length) + 0.5
    weights = []
    for index, start in enumerate(starts):
        weight = torch.ones(length)
        if index > 0 and (overlap := starts[index - 1] + length - start) > 0:
            weight = torch.minimum(weight, position / overlap)
        if index + 1 < len(starts) and (overlap := start + length - starts[index + 1]) > 0:
            weight = torch.minimum(weight, (length - position) / overlap)
        weights.append(weight)
    return weights


class Windows:
    """Overlapping windows that cover an area, and the weighted mean of their logits at its pixels.

    Attributes:
        area: (H, W) in pixels.
        size: (height, width) of a window, at most the area's.
        tops, lefts: first row of each row of windows, first column of each column of windows.
    """

    def __init__(
        self,
        area: tuple[int, int],
        size: tuple[int, int],
        stride: tuple[int, int],
        weights: Callable[[Sequence[int], int], list[Tensor]],
    ) -> None:
        """
        Args:
            area: (H, W) in pixels.
            size: (height, width) of a window.
            stride: (rows, columns) from one window to the next.
            weights: weights along one axis: :func:`ramp_weights` or :func:`uniform_weights`. A window's weight at a
                pixel is the product of both axes.
        """
        self.area = area
        self.size = (min(size[0], area[0]), min(size[1], area[1]))
        self.tops = window_starts(area[0], self.size[0], stride[0])
        self.lefts = window_starts(area[1], self.size[1], stride[1])
        self._down, self._across = weights(self.tops, self.size[0]), weights(self.lefts, self.size[1])

    def slices(self, row: int) -> list[tuple[slice, slice]]:
        """Rows and columns of the windows in a row of windows."""
        rows = slice(self.tops[row], self.tops[row] + self.size[0])
        return [(rows, slice(left, left + self.size[1])) for left in self.lefts]

    def mean(self, logits: Mapping[int, Sequence[GridLogits | SlidingLogits]], start: int, stop: int) -> Tensor:
        """Weighted mean ``(C, stop - start, W)`` of the windows' logits in the pixel rows from ``start`` to ``stop``.

        Args:
            logits: logits of the windows, by row of windows; at least those that contain the pixels.
        """
        if len(self.tops) == len(self.lefts) == 1:
            return logits[0][0].rows(start, stop)
        total, weights = None, None
        for row, windows in logits.items():
            first, last = max(start, self.tops[row]), min(stop, self.tops[row] + self.size[0])
            if first >= last:
                continue
            rows, own = slice(first - start, last - start), slice(first - self.tops[row], last - self.tops[row])
            for left, weight, window in zip(self.lefts, self._across, windows, strict=True):
                columns = slice(left, left + self.size[1])
                part = window.rows(own.start, own.stop)
                if total is None or weights is None:
                    total = part.new_zeros(len(part), stop - start, self.area[1])
                    weights = part.new_zeros(stop - start, self.area[1])
                share = (self._down[row][own, None] * weight).to(weights)
                total[:, rows, columns] += part.mul_(share)
                weights[rows, columns] += share
        assert total is not None
        return total.div_(weights)


@dataclasses.dataclass(frozen=True)
class SlidingLogits:
    """Logits of an image from windows: their mean at the pixels of the resized image, resized to the output size.

    Attributes:
        windows: windows of the resized image.
        logits: logits of the windows, by row of windows.
        size: (H, W) of the output.
    """

    windows: Windows
    logits: Mapping[int, Sequence[GridLogits]]
    size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        return self.logits[0][0].num_classes

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits ``(C, stop - start, W)`` of some rows of the output."""
        if self.windows.area == self.size:
            return self.windows.mean(self.logits, start, stop)
        above, below, share = (part[start:stop] for part in bilinear_taps(self.windows.area[0], self.size[0]))
        first, last = int(above[0]), int(below[-1]) + 1
        band = self.windows.mean(self.logits, first, last)
        # The number of rows does not change: this resizes the columns only.
        band = F.interpolate(band[None], (last - first, self.size[1]), mode="bilinear", align_corners=False)[0]
        above, below = (part.to(band.device) - first for part in (above, below))
        return torch.lerp(band[:, above], band[:, below], share.to(band)[:, None])

    def labels(self, memory: int) -> Tensor | None:
        """Labels ``(H, W)`` int64 by :func:`~reclip_d2.layers.upsample_argmax`; None if the logits at the pixels of the
        resized image need more than ``memory`` bytes."""
        height, width = self.windows.area
        if self.num_classes * height * width * BYTES > memory:
            return None
        return upsample_argmax(self.windows.mean(self.logits, 0, height)[None], self.size)[0]


def blended_bands(
    windows: Windows, predict: Callable[[slice, slice], GridLogits | SlidingLogits], memory: int
) -> Iterator[tuple[slice, Tensor]]:
    """Weighted mean of the windows' logits in bands of rows, without the whole (C, H, W) logits.

    Windows are predicted when the first band needs them, and dropped after the last.

    Args:
        predict: computes the logits of the window with these rows and columns.
        memory: bytes for logits at the area's pixels; a band has as many rows as fit, at least one.

    Yields:
        the band's rows, and its logits ``(C, rows, W)``.
    """
    height, width = windows.area
    active: dict[int, list[GridLogits | SlidingLogits]] = {}  # by row of windows
    next_row, start = 0, 0
    while start < height:
        if not active:
            active[next_row] = [predict(*slices) for slices in windows.slices(next_row)]
            next_row += 1
        classes = active[max(active)][0].num_classes
        # The band, and temporaries of twice a window's part of it.
        stop = min(start + rows_in(memory, classes, width + 2 * windows.size[1]), height)
        while next_row < len(windows.tops) and windows.tops[next_row] < stop:
            active[next_row] = [predict(*slices) for slices in windows.slices(next_row)]
            next_row += 1
        yield slice(start, stop), windows.mean(active, start, stop)
        start = stop
        active = {row: logits for row, logits in active.items() if windows.tops[row] + windows.size[0] > start}
