"""Losses: Eq. (7) of both stages, two terms of rectification that are not in the paper, and Eqs. (8) to (10) of
distillation.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) grids, (H, W) size in
pixels, K hypothesis rows (all images together; row r belongs to image b when ``offsets[b] <= r < offsets[b + 1]``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reclip_d2.modeling.numerics import full_precision
from reclip_d2.modeling.pooling import PooledHypotheses

NO_PSEUDO_LABEL = -1  # of padding; 255, which label files ignore, is a class of long lists


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


# ---- distillation ---------------------------------------------------------------------------------------------


@full_precision
def mask_guided_loss(logits: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Eq. (8): ``- 1/HW sum_ij log softmax(M^D)_ij[pseudo_ij]`` at full resolution, averaged over the images.

    Args:
        logits: M^D ``(B, C, h, w)``, resized bilinearly to the labels.
        pseudo_labels: ``(B, H, W)`` int64, the teacher's argmax; -1 (padding) is left out of the mean.
    """
    logits = F.interpolate(logits, size=pseudo_labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, pseudo_labels, ignore_index=NO_PSEUDO_LABEL, reduction="none")
    valid = pseudo_labels != NO_PSEUDO_LABEL
    return (loss.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()


@full_precision
def feature_guided_loss(student: Tensor, teacher: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. (9): ``|| Z - Z^ ||_1``, the L1 distance of a pixel's features, averaged over an image's pixels, then over
    the images.

    The paper gives no normalisation of the norm. Here it is the sum over the D channels, so that the loss does not
    vanish next to Eq. (8) as D grows, and the mean over pixels and images.

    At the image's size a batch of features is large: 6.7 GB for 12 crops of 520 px and D = 512. So the images are taken
    one by one, and the resized features are not kept for the backward pass but made again.

    Args:
        student: Z^ ``(B, D, h, w)``.
        teacher: Z ``(B, D, h', w')``.
        valid: ``(B, *size)`` bool, False for padding.
        size: both are resized to it bilinearly: the image's (the paper), or the student's own grid (cheaper).
    """
    images = zip(student.split(1), teacher.split(1), valid, strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(_mean_distance, z, target, v, size, **options) for z, target, v in images]).mean()


def _mean_distance(student: Tensor, teacher: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean L1 distance of one image's features ``(1, D, h, w)`` and ``(1, D, h', w')``, at ``size``, where valid."""

    def resize(x: Tensor) -> Tensor:
        same = tuple(x.shape[-2:]) == size
        return x if same else F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    distance = (resize(student) - resize(teacher)).abs().sum(1)[0]
    return (distance * valid).sum() / valid.sum().clamp(min=1)


def distillation_losses(
    terms: dict[str, Tensor], mask_weight: float = 1.0, alpha: float = 0.5, beta: float = 0.5
) -> dict[str, Tensor]:
    """Eq. (10): ``L_mask + alpha L_feat + beta L_text``, as the weighted terms that a trainer adds up and logs.

    Args:
        terms: those of ``mask``, ``feature`` and ``text`` that were computed.
        mask_weight: 1 in the paper; the weights are Table VIII.

    Returns:
        ``loss_mask``, ``loss_feature``, ``loss_text``.
    """
    weights = {"mask": mask_weight, "feature": alpha, "text": beta}
    return {f"loss_{name}": weights[name] * value for name, value in terms.items()}


def valid_pixels(image_sizes: list[tuple[int, int]], size: tuple[int, int], device: torch.device) -> Tensor:
    """``(B, H, W)`` bool: pixels of the image, not of the padding below and right of it."""
    rows, columns = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
    return torch.stack([(rows < h)[:, None] & (columns < w)[None, :] for h, w in image_sizes])
