"""Numerics: full precision inside autocast, and the cause of non-finite losses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reclip_d2.errors import ReclipError


def full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of tensors, or named tuples of tensors, to compute in float32 (or float64) even under
    autocast.

    For logits and losses: CLIP's cosine similarities are close together (a step of bfloat16 at 0.25 is 0.001, which the
    logit scale turns into 0.1), and this arithmetic is cheap compared with the networks.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tuple(map(_widened, args)), {key: _widened(value) for key, value in kwargs.items()}
        device = next(x.device for value in (*args, *kwargs.values()) for x in _tensors(value))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor)]


def _widened(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_widened, value))
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def check_finite(
    losses: Mapping[str, Tensor],
    *,
    trained: nn.Module,
    frozen_features: Tensor,
    logits: Callable[[], Tensor],
    temperatures: Mapping[str, float],
) -> None:
    """Raise :class:`ReclipError` for a loss that is NaN or infinite; the message names the cause and the key.

    All losses are checked at once, with a single synchronisation on a GPU. The images are never the cause: their pixels
    are integers.

    Args:
        losses: scalars, of one batch.
        trained: the module whose weights train.
        frozen_features: the frozen CLIP's features, any shape.
        logits: computes the mask logits, before any temperature; called only for the message.
        temperatures: effective temperatures, by config key.
    """
    if not losses or bool(torch.isfinite(torch.stack([value.detach() for value in losses.values()])).all()):
        return
    bad = next(name for name, value in losses.items() if not torch.isfinite(value))
    with torch.no_grad():
        raise ReclipError(f"{bad} is not finite: {_cause(trained, frozen_features, logits(), temperatures)}")


def _cause(trained: nn.Module, frozen_features: Tensor, logits: Tensor, temperatures: Mapping[str, float]) -> str:
    device = frozen_features.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    if not torch.isfinite(frozen_features).all():
        precision = "set MODEL.CLIP.AUTOCAST float32 and SOLVER.AMP.ENABLED False, or check MODEL.CLIP.PRETRAINED"
        return f"CLIP's image features are not finite: {precision}"
    weights = [p for p in trained.parameters() if p.requires_grad]
    if not all(bool(torch.isfinite(p).all()) for p in weights):
        return "the training has diverged, its weights are not finite: lower SOLVER.BASE_LR"
    if not torch.isfinite(logits).all():
        precision = ", or set SOLVER.AMP.DTYPE bfloat16" if half else ""
        return f"the mask logits overflow, so the weights have grown too large: lower SOLVER.BASE_LR{precision}"
    key = min(temperatures, key=lambda name: temperatures[name])
    largest = float(logits.abs().max())
    return (
        f"mask logits of up to {largest:.3g} are divided by temperatures, the lowest of which is {key}"
        f" {temperatures[key]:.3g}: raise it, or lower SOLVER.BASE_LR"
    )
