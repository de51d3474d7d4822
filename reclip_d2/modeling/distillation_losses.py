"""Losses of the distillation stage, Eqs. (8) to (10).

Shape letters: B images, C classes, D width of the joint embedding, (h, w) grids, (H, W) size in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reclip_d2.modeling.precision import full_precision

IGNORE_LABEL = -1  # no class: with long lists 255 is one


@full_precision
def mask_guided_loss(logits: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Eq. (8): ``- 1/HW sum_ij log softmax(M^D)_ij[pseudo_ij]`` at full resolution, averaged over the images.

    Args:
        logits: M^D ``(B, C, h, w)``, resized bilinearly to the labels.
        pseudo_labels: ``(B, H, W)`` int64, the teacher's argmax; -1 (padding) is left out of the mean.
    """
    logits = F.interpolate(logits, size=pseudo_labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, pseudo_labels, ignore_index=IGNORE_LABEL, reduction="none")
    valid = pseudo_labels != IGNORE_LABEL
    return (loss.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()


@full_precision
def feature_guided_loss(student: Tensor, teacher: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. (9): ``|| Z - Z^ ||_1``, the L1 distance of a pixel's features, averaged over an image's pixels, then over
    the images.

    The paper gives no normalisation of the norm. Here it is the sum over the D channels, so that the loss does not
    vanish beside Eq. (8) as D grows, and the mean over pixels and images.

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
