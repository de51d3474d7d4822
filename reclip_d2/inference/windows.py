"""Windows of an image, their logits, and how overlapping windows are blended.

Shape letters: C classes, (h, w) patch grid of a window, (H, W) size of the whole image in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.data.tiling import window_starts


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
class WindowLogits:
    """Logits of one window of an image, kept on the patch grid: upsampled, all windows together would be (C, H, W).

    Attributes:
        logits: ``(C, h, w)``.
        padded_size: (height, width) of the padded network input.
        network_size: (height, width) of the window in it, at the top left.
        size: (height, width) of the window in the image.
    """

    logits: Tensor
    padded_size: tuple[int, int]
    network_size: tuple[int, int]
    size: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits ``(C, stop - start, width)`` of some of the window's rows at the image's size, as
        :func:`~reclip_d2.modeling.postprocessing.upsample_logits` gives them: where there is padding, up to the
        network's input, the padding cropped off, and then to the image's size; otherwise at once."""
        down, across = (self._resize(axis).to(self.logits) for axis in (0, 1))
        # Rows first: few of them are wanted, and the product with the columns is then a small one.
        return torch.einsum("rh,chw->crw", down[start:stop], self.logits) @ across.T

    def _resize(self, axis: int) -> Tensor:
        last = (self.size[axis], self.size[axis])
        padding = (self.padded_size[axis], self.network_size[axis])
        steps = (last,) if self.padded_size == self.network_size else (padding, last)
        return resize_matrix(self.logits.shape[1 + axis], steps)


def ramp_weights(starts: Sequence[int], length: int) -> list[Tensor]:
    """Weights ``(length,)`` of the windows along one axis: 1, falling in a straight line where a neighbour overlaps.

    They are above 0 everywhere, and 1 at the image's border. Where two windows overlap by m pixels, the i-th of them
    has weights (i + 1/2) / m and 1 - (i + 1/2) / m.
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


def blended_bands(
    image_size: tuple[int, int],
    window: tuple[int, int],
    stride: tuple[int, int],
    predict: Callable[[slice, slice], WindowLogits],
    memory: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of an image, from overlapping windows, in bands of rows: the (C, H, W) logits never exist.

    Each pixel's logits are the mean over its windows, weighted by :func:`ramp_weights` along both axes. Windows are
    predicted when the first band needs them, and dropped after the last.

    Args:
        image_size: (H, W).
        window: (height, width), cut at the image's size.
        stride: (rows, columns) from one window to the next.
        predict: logits of the window of these rows and columns.
        memory: bytes for logits at the image's size; a band has as many rows as fit, at least one.

    Yields:
        the band's rows, and its logits ``(C, rows, W)``.
    """
    height, width = image_size
    size = (min(window[0], height), min(window[1], width))
    tops, lefts = window_starts(height, size[0], stride[0]), window_starts(width, size[1], stride[1])
    down, across = ramp_weights(tops, size[0]), ramp_weights(lefts, size[1])
    active: dict[int, list[WindowLogits]] = {}  # by the windows' row
    next_row, start = 0, 0
    while start < height:
        if not active:
            active[next_row] = _predict_row(predict, tops[next_row], lefts, size)
            next_row += 1
        classes = active[max(active)][0].logits.shape[0]
        # The band itself, and beside it a window's part of it, twice.
        stop = min(start + max(1, memory // (4 * classes * (width + 2 * size[1]))), height)
        while next_row < len(tops) and tops[next_row] < stop:
            active[next_row] = _predict_row(predict, tops[next_row], lefts, size)
            next_row += 1
        yield slice(start, stop), _blend(active, tops, lefts, down, across, size, slice(start, stop), width)
        start = stop
        active = {row: windows for row, windows in active.items() if tops[row] + size[0] > start}


def _predict_row(
    predict: Callable[[slice, slice], WindowLogits], top: int, lefts: Sequence[int], size: tuple[int, int]
) -> list[WindowLogits]:
    return [predict(slice(top, top + size[0]), slice(left, left + size[1])) for left in lefts]


def _blend(
    active: dict[int, list[WindowLogits]],
    tops: Sequence[int],
    lefts: Sequence[int],
    down: Sequence[Tensor],
    across: Sequence[Tensor],
    size: tuple[int, int],
    band: slice,
    width: int,
) -> Tensor:
    """Weighted mean of the windows in the rows ``band``."""
    if len(tops) == len(lefts) == 1:
        return active[0][0].rows(band.start, band.stop)
    some = next(iter(active.values()))[0].logits
    total = some.new_zeros(some.shape[0], band.stop - band.start, width)
    weights = some.new_zeros(band.stop - band.start, width)
    for row, windows in active.items():
        first, last = max(band.start, tops[row]), min(band.stop, tops[row] + size[0])
        rows, own = slice(first - band.start, last - band.start), slice(first - tops[row], last - tops[row])
        for left, weight, window in zip(lefts, across, windows, strict=True):
            columns = slice(left, left + size[1])
            share = (down[row][own, None] * weight).to(some)
            total[:, rows, columns] += window.rows(own.start, own.stop).mul_(share)
            weights[rows, columns] += share
    return total.div_(weights)
