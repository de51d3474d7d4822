"""Full precision inside autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of tensors, or named tuples of them: it computes in float32 under autocast too; float64
    stays.

    For logits and losses: CLIP's cosine similarities lie close together (a step of bfloat16 at 0.25 is 0.001, which the
    logit scale makes 0.1), and this arithmetic costs little beside the networks.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tuple(map(_widened, args)), {key: _widened(value) for key, value in kwargs.items()}
        device = next(x.device for value in (*args, *kwargs.values()) for x in _tensors(value))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor)]


def _widened(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_widened, value))
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value
