"""Losses of the rectification stage: Eq. (7), and two terms that are not in the paper.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, K hypothesis rows (all
images together; row r belongs to image b when ``offsets[b] <= r < offsets[b + 1]``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.modeling.pooling import PooledHypotheses
from reclip_d2.modeling.precision import full_precision


@full_precision
def contrastive_loss(pooled: PooledHypotheses, query_features: Tensor, tau: float) -> Tensor:
    """Eq. (7), averaged over the images; the text-guided loss of distillation is the same on the student's masks.

    ``-1/|H| sum_{k in H} log( exp(S_kk / tau) / sum_j exp(S_kj / tau) )`` with S the cosine similarity of the
    masked feature of class k and the text feature of class j.

    Args:
        pooled: by :func:`~reclip_d2.modeling.pooling.pool_hypotheses`. A row without a feature (area 0, or a mask on
            padding alone, whose pooled feature is exactly 0) adds no loss and no gradient, while |H| still counts it.
        query_features: W_q ``(C, D)``, rows of length 1.
        tau: temperature.

    Returns:
        scalar; 0 when there is no row.
    """
    features, area, class_ids, offsets = pooled
    similarity = F.normalize(features, dim=-1) @ query_features.T
    row_loss = F.cross_entropy(similarity / tau, class_ids, reduction="none")
    # Not `area > 0`: that would make a NaN area a silent zero.
    empty = (area == 0) | (features.detach() == 0).all(dim=-1)
    row_loss = torch.where(empty, torch.zeros_like(row_loss), row_loss)
    counts = offsets.diff()
    weight = counts.clamp(min=1).to(row_loss.dtype).reciprocal().repeat_interleave(counts, output_size=len(class_ids))
    return (row_loss * weight).sum() / len(counts)


def hypothesis_mask(class_ids: Tensor, offsets: Tensor, num_classes: int) -> Tensor:
    """Multi-hot hypothesis ``(B, C)`` bool of the ragged lists ``class_ids``, ``offsets``."""
    counts = offsets.diff()
    images = torch.arange(len(counts), device=class_ids.device).repeat_interleave(counts, output_size=len(class_ids))
    mask = torch.zeros(len(counts), num_classes, dtype=torch.bool, device=class_ids.device)
    mask[images, class_ids] = True
    return mask


def _mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``(B, n)`` values over the patches of the image, padding left out."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


@full_precision
def coverage_loss(logits: Tensor, in_hypothesis: Tensor, valid: Tensor, tau: float) -> Tensor:
    """Not in the paper: ``- mean_n log sum_{c in H} p_nc`` with ``p = softmax(logits / tau)``.

    Eq. (7) asks only that the masks of H be pure; this asks that every patch belong to some class of H.

    Args:
        logits: ``(B, n, C)``.
        in_hypothesis: ``(B, C)`` bool.
        valid: ``(B, n)`` bool, False for patches of padding.
        tau: temperature tau_1 of the masks.
    """
    logits = logits.float() / tau
    inside = logits.masked_fill(~in_hypothesis[:, None, :], float("-inf")).logsumexp(-1)
    # An image without hypothesis asks for nothing.
    has_hypothesis = in_hypothesis.any(1)
    inside = torch.where(has_hypothesis[:, None], inside, logits.logsumexp(-1))
    return _mean_over_valid(logits.logsumexp(-1) - inside, valid)


@full_precision
def outside_hypothesis_penalty(logits: Tensor, in_hypothesis: Tensor, valid: Tensor, tau: float) -> Tensor:
    """Not in the paper: ``mean_n sum_{c not in H} p_nc`` with ``p = softmax(logits / tau)``: mask mass outside H.

    Arguments as for :func:`coverage_loss`. Bounded by 1, so a patch that H is wrong about cannot dominate.
    """
    probabilities = (logits.float() / tau).softmax(-1)
    outside = (probabilities * ~in_hypothesis[:, None, :]).sum(-1)
    has_hypothesis = in_hypothesis.any(1)
    return _mean_over_valid(outside * has_hypothesis[:, None], valid)
