"""Gumbel-Softmax masks, Eq. (5) of the ReCLIP++ paper.

Shapes: B images, n = h*w patches, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reclip_d2.layers._checks import accumulate_dtype, check_float, check_seed, check_tau
from reclip_d2.layers._extension import extension_loaded, kernels_enabled
from reclip_d2.layers.philox import NoiseCounter, gumbel_noise, seed_for


def gumbel_softmax(logits: Tensor, tau: float, hard: bool = True, seed: Tensor | NoiseCounter | None = None) -> Tensor:
    """Sample a soft or one-hot mask for every patch, Eq. (5): ``softmax(logits / tau + g)`` over the classes.

    The standard Gumbel noise g is added after the scaling and is not divided by tau, as in the papers' public code
    (logits x 100, then a Gumbel-Softmax of temperature 1): a hard mask is a sample from softmax(logits / tau).

    Args:
        logits: (B, n, C), any strides, float64, float32, float16 or bfloat16.
        tau: temperature tau_1 of the logits, positive.
        hard: one-hot masks with the gradient of the soft masks (straight-through); otherwise soft masks.
        seed: int64 tensor (2,) that addresses the noise, on the CPU or with the logits; a
            :class:`~reclip_d2.layers.philox.NoiseCounter`, which gives one; None draws one with :func:`draw_seed`.

    Returns:
        Masks (B, n, C) in the dtype of the logits, computed in float32 or wider. A patch with a non-finite score (NaN,
        infinity or overflow of logits / tau) gets NaN for all its classes, so that results computed from it show the
        error, and no gradient. Exclude a class by a large negative number, not by -inf.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, tau or seed.
    """
    check_float("gumbel_softmax", "logits", logits, "B,n,C")
    tau = check_tau("gumbel_softmax", tau)
    seed = check_seed("gumbel_softmax", seed_for(seed), logits.device)
    if kernels_enabled(logits.device.type):
        return torch.ops.reclip_d2.gumbel_softmax(logits, seed, tau, hard)
    return gumbel_softmax_reference(logits, tau, hard, seed)


def gumbel_softmax_reference(logits: Tensor, tau: float, hard: bool, seed: Tensor) -> Tensor:
    """Plain-PyTorch twin of :func:`gumbel_softmax`, with the same noise: reference for the tests, and fallback."""
    dtype = accumulate_dtype(logits.dtype)
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(dtype) * (1.0 / tau) + gumbel_noise(logits.shape, seed, logits.device, dtype)
        finite = torch.isfinite(scores).all(dim=-1, keepdim=True)
        masks = torch.softmax(torch.where(finite, scores, 0.0), dim=-1)
        if hard:
            one_hot = torch.zeros_like(masks)
            if scores.numel():
                one_hot.scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
            # The parentheses are exactly zero, so the mask is exactly one-hot; they only carry the gradient.
            masks = one_hot + (masks - masks.detach())
        return torch.where(finite, masks, float("nan")).to(logits.dtype)


def _fake(logits: Tensor, seed: Tensor, tau: float, hard: bool) -> Tensor:
    return torch.empty_like(logits)


def _fake_backward(grad_masks: Tensor, logits: Tensor, seed: Tensor, tau: float) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, seed, ctx.tau, _ = inputs
    ctx.save_for_backward(logits, seed)


def _backward(ctx: Any, grad_masks: Tensor) -> tuple[Tensor, None, None, None]:
    logits, seed = ctx.saved_tensors
    return torch.ops.reclip_d2.gumbel_softmax_backward(grad_masks, logits, seed, ctx.tau), None, None, None


if extension_loaded():
    torch.library.register_fake("reclip_d2::gumbel_softmax", _fake)
    torch.library.register_fake("reclip_d2::gumbel_softmax_backward", _fake_backward)
    torch.library.register_autograd("reclip_d2::gumbel_softmax", _backward, setup_context=_setup_context)
