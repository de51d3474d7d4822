"""Argument checks shared by the operators: each failure is one line that names the argument.

Shapes: B images, n = h*w patches, D embedding width, C classes, K hypothesis rows (all images together).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def shape_of(tensor: Tensor) -> str:
    """Shape of a tensor as ``(2, 3)``, for messages."""
    return str(tuple(tensor.shape))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype for ``dtype`` values: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """Raise unless ``tensor`` is a floating-point tensor with the dimensions that ``dims`` names, such as "B,n,C"."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: `{name}` must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{op}: `{name}` must have shape ({dims}), got {shape_of(tensor)}")


def check_same(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors are on one device, and both or neither are float64."""
    if tensor.device != other.device:
        raise ValueError(f"{op}: `{name}` is on {tensor.device} but `{other_name}` is on {other.device}")
    if (tensor.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(f"{op}: `{name}` is {tensor.dtype} but `{other_name}` is {other.dtype}: float64 does not mix")


def check_pixels(op: str, name: str, grid: Tensor, pixels_name: str, pixels: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``grid`` (B,C,h,w) can be resized to the size of ``pixels`` (B,H,W), which has the given dtype."""
    check_float(op, name, grid, "B,C,h,w")
    if 0 in grid.shape[1:]:
        raise ValueError(f"{op}: `{name}` must have channels and a grid, got shape {shape_of(grid)}")
    if not isinstance(pixels, Tensor) or pixels.dtype != dtype:
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"{op}: `{pixels_name}` must be {dtype}, got {found}")
    if pixels.dim() != 3 or pixels.shape[0] != grid.shape[0] or 0 in pixels.shape[1:]:
        raise ValueError(
            f"{op}: `{pixels_name}` must be (B,H,W) with B = {grid.shape[0]} and at least one pixel,"
            f" got shape {shape_of(pixels)}"
        )
    if pixels.device != grid.device:
        raise ValueError(f"{op}: `{pixels_name}` is on {pixels.device} but `{name}` is on {grid.device}")


def check_tau(op: str, tau: float) -> float:
    """The temperature as a float; raise unless it is positive and finite."""
    tau = float(tau)
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"{op}: `tau` must be positive and finite, got {tau}")
    return tau


def check_seed(op: str, seed: Tensor, device: torch.device) -> Tensor:
    """The seed; raise unless it is an int64 tensor of shape (2,), on the CPU or on ``device``."""
    if (
        not isinstance(seed, Tensor)
        or seed.dtype != torch.int64
        or tuple(seed.shape) != (2,)
        or seed.device not in (torch.device("cpu"), device)
    ):
        found = f"{seed.dtype} {shape_of(seed)} on {seed.device}" if isinstance(seed, Tensor) else type(seed).__name__
        raise ValueError(
            f"{op}: `seed` must be an int64 tensor of shape (2,), on the CPU or with the logits, see draw_seed(),"
            f" got {found}"
        )
    return seed.contiguous()


def check_index_tensors(op: str, class_ids: Tensor, offsets: Tensor, batch: int) -> None:
    """Raise unless class_ids (K,) and offsets (B+1,) are int64 vectors that fit a batch of ``batch`` images."""
    for name, tensor in (("class_ids", class_ids), ("offsets", offsets)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.dim() != 1:
            found = f"{tensor.dtype} {shape_of(tensor)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: `{name}` must be a one-dimensional int64 tensor, got {found}")
    if offsets.shape[0] != batch + 1:
        raise ValueError(
            f"{op}: `offsets` must have B+1 = {batch + 1} entries for {batch} images, got {offsets.shape[0]}"
        )


def rows_together(class_ids: Tensor, offsets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The hypothesis rows as the kernels of a device take them: both tensors on it, or else both on the CPU."""
    if class_ids.device != device or offsets.device != device:
        class_ids, offsets = class_ids.cpu(), offsets.cpu()
    return class_ids.contiguous(), offsets.contiguous()


def check_hypothesis(op: str, class_ids: Tensor, offsets: Tensor, classes: int) -> None:
    """Raise unless the hypothesis rows are consistent: non-decreasing offsets, class ids in range and distinct within
    an image."""
    rows = class_ids.shape[0]
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] > rows or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{op}: `offsets` must rise from 0 to at most K = {rows} without falling, got {bounds}")
    ids = class_ids.tolist()
    for image, (start, stop) in enumerate(pairwise(bounds)):
        own = ids[start:stop]
        for k in own:
            if not 0 <= k < classes:
                raise ValueError(f"{op}: `class_ids` holds {k} for image {image}; there are {classes} classes")
        if len(set(own)) != len(own):
            twice = next(k for k in own if own.count(k) > 1)
            raise ValueError(f"{op}: `class_ids` holds class {twice} more than once for image {image}")
