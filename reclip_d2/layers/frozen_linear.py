"""A linear layer with constant weights: on CPUs computed by oneDNN, which torch uses for convolutions only; under
autocast with copies of the weights that are made once.

For float32, ``torch.nn.functional.linear`` calls MKL, which uses half the vector width of other vendors' CPUs: there
oneDNN is twice as fast. Results differ by rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.layers.frozen_weights import autocast_copy

FEWEST_OPERATIONS = 1 << 19
"""Multiplications from which oneDNN's larger overhead pays (measured)."""


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, differentiable in x only.

    Same as ``torch.nn.functional.linear`` up to rounding, and the very same where :func:`uses_onednn` is false.

    Args:
        x: ``(..., I)``.
        weight: W ``(O, I)``, without gradient if oneDNN is to be used.
        bias: b ``(O,)``; None for zero.

    Returns:
        ``(..., O)``.
    """
    if not uses_onednn(x, weight, bias):
        return F.linear(x, autocast_copy(weight), autocast_copy(bias))
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias)
    return _onednn_linear(x, weight, bias)


def uses_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether :func:`frozen_linear` uses oneDNN: large enough float32 matrices on the CPU, frozen weights, and neither
    autocast, nor tracing, nor compiling."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= FEWEST_OPERATIONS
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and _onednn_works()
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    """The gradient of x; W and b have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn_linear(grad, weight.t(), None), None, None


@functools.cache
def _onednn_works() -> bool:
    """Whether this build of torch has the operator, which is not part of its public interface, and it is right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        found = [_onednn_linear(x, weight, torch.ones(4)), _onednn_linear(torch.ones(2, 4), weight.t(), None)]
    except (RuntimeError, AttributeError, TypeError):
        return False
    expected = [F.linear(x, weight, torch.ones(4)), torch.ones(2, 4) @ weight]
    return all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
