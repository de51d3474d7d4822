"""Losses: Eq. (7) of both stages, three rectification losses that are not in the paper, and Eqs. (8) to (10) of
distillation.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) grids, (H, W) size in
pixels, K hypothesis rows (all images together; row r belongs to image b when ``offsets[b] <= r < offsets[b + 1]``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.layers import upsample_cross_entropy, upsample_l1
from reclip_d2.modeling.numerics import full_precision
from reclip_d2.modeling.pooling import PooledHypotheses

NO_PSEUDO_LABEL = -1  # for padding; not 255, the ignore label of files, which is a class in long class lists


@full_precision
def contrastive_loss(pooled: PooledHypotheses, query_features: Tensor, tau: float) -> Tensor:
    """Eq. (7), averaged over the images; distillation uses it on the student's masks as the text-guided loss.

    ``-1/|H| sum_{k in H} log( exp(S_kk / tau) / sum_j exp(S_kj / tau) )`` with S the cosine similarity of the
    masked feature of class k and the text feature of class j.

    Args:
        pooled: from :func:`~reclip_d2.modeling.pooling.pool_hypotheses`. A row without a feature (area 0, or a mask on
            padding only, whose pooled feature is exactly 0) adds no loss and no gradient, but counts in |H|; rows of
            padding do not count.
        query_features: W_q ``(C, D)``, rows of length 1.
        tau: temperature.

    Returns:
        scalar; 0 if there are no rows.
    """
    features, area, class_ids, offsets = pooled
    images, counts = image_of_rows(offsets, len(class_ids)), offsets.diff()
    # In float64, rounded at the end: products and sums do not depend on the number of rows of padding.
    similarity = F.normalize(features.double(), dim=-1) @ query_features.double().T
    row_loss = F.cross_entropy(similarity / tau, class_ids, reduction="none")
    # Not `area > 0`, which would silently turn a NaN area into a loss of zero.
    empty = (area == 0) | (features.detach() == 0).all(dim=-1)
    row_loss = torch.where(empty, torch.zeros_like(row_loss), row_loss)
    weight = F.pad(counts.clamp(min=1).to(row_loss.dtype).reciprocal(), (0, 1))[images]
    return ((row_loss * weight).sum() / len(counts)).to(features.dtype)


def image_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Image of each hypothesis row, ``(K,)`` int64 in 0 .. B-1; B for rows of padding, from ``offsets[B]`` on."""
    return torch.searchsorted(offsets[1:], torch.arange(rows, device=offsets.device), right=True)


def hypothesis_mask(class_ids: Tensor, offsets: Tensor, num_classes: int) -> Tensor:
    """Multi-hot hypotheses ``(B, C)`` bool from the ragged lists ``class_ids``, ``offsets``."""
    images, rows = len(offsets) - 1, image_of_rows(offsets, len(class_ids))
    mask = torch.zeros(images + 1, num_classes, dtype=torch.bool, device=class_ids.device)
    mask[rows, class_ids] = True
    return mask[:images]  # without the padding


def _mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values ``(B, n)`` over the valid patches."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


@full_precision
def coverage_loss(logits: Tensor, in_hypothesis: Tensor, valid: Tensor, tau: float) -> Tensor:
    """Not in the paper: ``- mean_n log sum_{c in H} p_nc`` with ``p = softmax(logits / tau)``.

    Eq. (7) only makes the masks of H pure; this loss makes every patch belong to some class of H.

    Args:
        logits: ``(B, n, C)``.
        in_hypothesis: ``(B, C)`` bool.
        valid: ``(B, n)`` bool, False for patches of padding.
        tau: temperature tau_1 of the masks.
    """
    logits = logits.float() / tau
    inside = logits.masked_fill(~in_hypothesis[:, None, :], float("-inf")).logsumexp(-1)
    # An image without a hypothesis adds no loss.
    has_hypothesis = in_hypothesis.any(1)
    inside = torch.where(has_hypothesis[:, None], inside, logits.logsumexp(-1))
    return _mean_over_valid(logits.logsumexp(-1) - inside, valid)


@full_precision
def outside_hypothesis_penalty(logits: Tensor, in_hypothesis: Tensor, valid: Tensor, tau: float) -> Tensor:
    """Not in the paper: ``mean_n sum_{c not in H} p_nc`` with ``p = softmax(logits / tau)``: mask mass outside H.

    Arguments as for :func:`coverage_loss`. Bounded by 1, so patches for which H is wrong cannot dominate.
    """
    probabilities = (logits.float() / tau).softmax(-1)
    outside = (probabilities * ~in_hypothesis[:, None, :]).sum(-1)
    has_hypothesis = in_hypothesis.any(1)
    return _mean_over_valid(outside * has_hypothesis[:, None], valid)


@full_precision
def anchor_loss(logits: Tensor, query_logits: Tensor, valid: Tensor, tau: float, scale: float) -> Tensor:
    """Not in the paper: ``- mean_n q_n log p_n[y_n]``, which keeps MaskCLIP's labels where it is confident.

    ``p = softmax(logits / tau)``; y_n is the largest of M_q (MaskCLIP's label, unless the Query is learned), and q_n
    its probability, ``max_c softmax(scale M_q)_nc``.

    Args:
        logits: M_o ``(B, n, C)``.
        query_logits: M_q ``(B, n, C)``; gets no gradient.
        valid: ``(B, n)`` bool, False for patches of padding.
        tau: temperature tau_1 of the masks.
        scale: CLIP's logit scale.
    """
    confidence, labels = (scale * query_logits.detach().float()).softmax(-1).max(-1)
    log_probability = (logits.float() / tau).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return _mean_over_valid(-confidence * log_probability, valid)


# ---- distillation ---------------------------------------------------------------------------------------------


@full_precision
def mask_guided_loss(logits: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Eq. (8): ``- 1/HW sum_ij log softmax(M^D)_ij[pseudo_ij]`` at full resolution, averaged over the images.

    Args:
        logits: M^D ``(B, C, h, w)``, resized bilinearly to the size of the labels.
        pseudo_labels: ``(B, H, W)`` int64, the teacher's argmax; -1 (padding) is ignored.
    """
    return upsample_cross_entropy(logits, pseudo_labels).mean()


@full_precision
def feature_guided_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Eq. (9): ``|| Z - Z^ ||_1``, the L1 distance of a pixel's features, averaged over an image's pixels, then over
    the images.

    The paper does not normalise the norm. Here it is the sum over the D channels, so that the loss does not vanish next
    to Eq. (8) as D grows, and the mean over pixels and images.

    Args:
        student: Z^ ``(B, D, h, w)``.
        teacher: Z ``(B, D, h', w')``.
        valid: ``(B, H, W)`` bool, False for padding. Both maps are resized to it bilinearly: the image's size (the
            paper), or the student's grid (cheaper).
    """
    return upsample_l1(student, teacher, valid).mean()


def distillation_losses(
    terms: dict[str, Tensor], mask_weight: float = 1.0, alpha: float = 0.5, beta: float = 0.5
) -> dict[str, Tensor]:
    """Eq. (10): ``L_mask + alpha L_feat + beta L_text``, as weighted terms for the trainer to sum and log.

    Args:
        terms: the computed terms, by name: ``mask``, ``feature``, ``text``.
        mask_weight: 1 in the paper; Table VIII varies the weights.
        alpha: weight of ``feature``.
        beta: weight of ``text``.

    Returns:
        ``loss_mask``, ``loss_feature``, ``loss_text``.
    """
    weights = {"mask": mask_weight, "feature": alpha, "text": beta}
    return {f"loss_{name}": weights[name] * value for name, value in terms.items()}


def valid_pixels(image_sizes: Sequence[tuple[int, int]], size: tuple[int, int], device: torch.device) -> Tensor:
    """``(B, H, W)`` bool: pixels of the images, False for padding (bottom and right)."""
    rows, columns = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
    return torch.stack([(rows < h)[:, None] & (columns < w)[None, :] for h, w in image_sizes])
