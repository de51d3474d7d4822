"""Mean-probability calibration (not in the papers): a training-free control, and used by calibrated hypotheses.

An offset per class (or per position and class) is added to the logits so that the mean softmax over unlabelled images
has given class shares: uniform ones, right where all classes are equally frequent, or estimated ones
(:mod:`reclip_d2.modeling.class_shares`). It needs no labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_probability_offset(
    logits: Tensor, scale: float, shares: Tensor | None = None, iterations: int = 200, tolerance: float = 1e-4
) -> Tensor:
    """Offset that gives the mean softmax over the samples the class shares pi.

    Solves ``mean_m softmax(scale * (logits_m + offset)) = pi``, the stationary point of the convex function
    ``mean_m logsumexp(z_m + o) - sum_c pi_c o_c``, by the fixed-point step ``o <- o - log(mean probability / pi)``
    (Sinkhorn's scaling of the matrix ``exp(z)`` to column sums pi).

    Args:
        logits: ``(M, ..., C)``: M samples; the middle dimensions are independent problems.
        scale: factor on the logits inside the softmax (CLIP's logit scale).
        shares: pi ``(C,)``, of sum 1; None for uniform shares.
        iterations: maximum number of steps.
        tolerance: stop when all mean probabilities are within this relative distance of their shares.

    Returns:
        ``(..., C)`` float32, in units of the logits, with mean 0 over the classes.
    """
    logits = logits.float() * scale
    num_classes = logits.shape[-1]
    inverse_shares = num_classes if shares is None else shares.to(logits).clamp(min=1e-6).reciprocal()
    offset = torch.zeros(logits.shape[1:], device=logits.device)
    for _ in range(iterations):
        mean = torch.softmax(logits + offset, dim=-1).mean(dim=0)
        step = (mean * inverse_shares).clamp(min=1e-12).log()
        offset -= step
        if step.abs().max() < tolerance:
            break
    return (offset - offset.mean(dim=-1, keepdim=True)) / scale
