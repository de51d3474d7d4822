"""Mean-probability calibration (not in the papers): a training-free control, and used by calibrated hypotheses.

An offset per class (or per position and class) is added to the logits so that the mean softmax over unlabelled images
is uniform, as for a model without preferences if all classes are equally frequent. It needs no labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_probability_offset(logits: Tensor, scale: float, iterations: int = 200, tolerance: float = 1e-4) -> Tensor:
    """Offset that makes the mean softmax uniform over the classes.

    Solves ``mean_m softmax(scale * (logits_m + offset)) = 1 / C``, the stationary point of the convex function
    ``mean_m logsumexp(z_m + o) - mean_c o_c``, by the fixed-point step ``o <- o - log(C * mean probability)``
    (Sinkhorn's scaling of the matrix ``exp(z)`` to uniform column sums).

    Args:
        logits: ``(M, ..., C)``: M samples; the middle dimensions are independent problems.
        scale: factor on the logits inside the softmax (CLIP's logit scale).
        iterations: maximum number of steps.
        tolerance: stop when all mean probabilities are within this relative distance of ``1 / C``.

    Returns:
        ``(..., C)`` float32, in units of the logits, with mean 0 over the classes.
    """
    logits = logits.float() * scale
    num_classes = logits.shape[-1]
    offset = torch.zeros(logits.shape[1:], device=logits.device)
    for _ in range(iterations):
        mean = torch.softmax(logits + offset, dim=-1).mean(dim=0)
        step = (mean * num_classes).clamp(min=1e-12).log()
        offset -= step
        if step.abs().max() < tolerance:
            break
    return (offset - offset.mean(dim=-1, keepdim=True)) / scale
