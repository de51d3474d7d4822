"""Sliding windows of Eq. (6), and their crops.

Shape letters: N windows of an image, (H, W) image size in pixels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.layers import bicubic_matrix


def _starts(length: int, ratio: float) -> tuple[list[int], int]:
    """Start pixels of the windows along one axis, and the windows' length."""
    window = max(1, round(length * ratio))
    count = round(2 * (1 - ratio) / ratio) + 1
    return [round(i * (length - window) / max(count - 1, 1)) for i in range(count)], window


def crop_windows(height: int, width: int, ratio: float) -> Tensor:
    """Windows of ``ratio`` times the image's height and width at a stride of half a window, row by row.

    The windows of an image have the same size and are spaced evenly from border to border; for ``ratio = 1/m`` the
    stride is half a window, up to rounding to pixels, and there are (2m - 1)^2 windows: 121 for 1/6.

    Returns:
        ``(N, 4)`` int64 boxes (x0, y0, x1, y1), the ends exclusive.

    Raises:
        ReclipError: ``ratio`` is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ReclipError(f"HYPOTHESIS.WINDOW_RATIO is {ratio}; it must be above 0 and at most 1")
    rows, window_h = _starts(height, ratio)
    columns, window_w = _starts(width, ratio)
    return torch.tensor([[x, y, x + window_w, y + window_h] for y in rows for x in columns])


@functools.lru_cache(maxsize=4096)
def count_windows(height: int, width: int, ratio: float) -> int:
    """Number of windows of :func:`crop_windows`."""
    return len(_starts(height, ratio)[0]) * len(_starts(width, ratio)[0])


def cut_crops(image: Tensor, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops of one image, each resized to ``size`` (bicubic, antialiased, as in CLIP's preprocessing).

    Args:
        image: ``(3, H, W)`` float in [0, 255].
        windows: ``(N, 4)`` from :func:`crop_windows`, all of the same size.
        size: (height, width) of the resized crops.

    Returns:
        ``(N, 3, *size)`` float in [0, 255].
    """
    if image.is_cuda and (places := _grid_of(windows)) is not None:
        return crops_by_products(image, *places, size)
    crops = torch.stack([image[:, y0:y1, x0:x1] for x0, y0, x1, y1 in windows.tolist()])
    return resize_pixels(crops, size)


class _Strips(NamedTuple):
    """Windows along one axis."""

    starts: tuple[int, ...]
    length: int


def _grid_of(windows: Tensor) -> tuple[_Strips, _Strips] | None:
    """Rows and columns of windows that form a grid, row by row; None for others."""
    boxes = [tuple(box) for box in windows.tolist()]
    tops, lefts = dict.fromkeys(box[1] for box in boxes), dict.fromkeys(box[0] for box in boxes)
    height, width = boxes[0][3] - boxes[0][1], boxes[0][2] - boxes[0][0]
    if boxes != [(x, y, x + width, y + height) for y in tops for x in lefts]:
        return None
    return _Strips(tuple(tops), height), _Strips(tuple(lefts), width)


def crops_by_products(image: Tensor, rows: _Strips, columns: _Strips, size: tuple[int, int]) -> Tensor:
    """:func:`cut_crops` of a grid of windows, up to rounding, in a few launches for all: strips of rows are cut and
    resized by one product, then cut and resized along the other axis."""
    over_rows, over_columns = (
        bicubic_matrix(strips.length, side, image.device, image.dtype, antialias=True)
        for strips, side in zip((rows, columns), size, strict=True)
    )
    strips = over_rows @ image[:, _pixels_of(rows, image.device)]  # (3, R, h', W)
    tiles = strips[..., _pixels_of(columns, image.device)] @ over_columns.T  # (3, R, h', C, w')
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).clamp_(0, 255)


@functools.lru_cache(maxsize=1024)
def _pixels_of(strips: _Strips, device: torch.device) -> Tensor:
    """``(S, length)`` int64: the pixels of each strip."""
    return (torch.tensor(strips.starts)[:, None] + torch.arange(strips.length)).to(device)


def resize_pixels(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``(3, H, W)`` or ``(B, 3, H, W)`` in [0, 255], resized as in CLIP's preprocessing (bicubic, antialiased):
    ``(B, 3, *size)`` float32."""
    images = (images if images.ndim == 4 else images[None]).float()
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp_(0, 255)


def one_pass_size(height: int, width: int, sides: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Resized (height, width) of an image whose windows are encoded in one pass: about the same aspect ratio, both
    sides multiples of the patch size.

    Args:
        sides: target of the short side and maximum of the long side, like ``INPUT.MIN_SIZE_TEST`` and
            ``INPUT.MAX_SIZE_TEST``; a short side of 0 keeps the image's size.
        patch_size: in pixels.
    """
    short, longest = sides
    scale = min(short / min(height, width), longest / max(height, width)) if short else 1.0
    rows, columns = (max(1, round(side * scale / patch_size)) for side in (height, width))
    return rows * patch_size, columns * patch_size
