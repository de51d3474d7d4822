"""From mask logits and a hypothesis to the pooled features that Eq. (7) reads.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) patch grid, K hypothesis
rows (all images together; row r belongs to image b when ``offsets[b] <= r < offsets[b + 1]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reclip_d2.layers import rectify_and_pool
from reclip_d2.modeling.bias_head import rectified_logits


class MaskLogits(NamedTuple):
    """Mask logits as the difference ``logits - bias``, not yet taken: :func:`pool_hypotheses` subtracts on the fly."""

    logits: Tensor
    """``(B, C, h, w)``."""
    bias: Tensor | None = None
    """``(n, C)``, the same for all images; None for zero."""

    def tensor(self) -> Tensor:
        """The difference ``(B, C, h, w)``."""
        return rectified_logits(self.logits, self.bias)


class Hypotheses(NamedTuple):
    """Hypothesis classes of a batch as ragged rows, on the CPU: the pooling operators read them on the host."""

    class_ids: Tensor
    """``(K,)`` int64."""
    offsets: Tensor
    """``(B + 1,)`` int64, rising from 0 to K."""


class PooledHypotheses(NamedTuple):
    """Masked average-pooled features of the hypothesis rows, and whose rows they are; on the features' device."""

    features: Tensor
    """Z_g ``(K, D)``."""
    area: Tensor
    """``(K,)`` mask areas in patches, padding included."""
    class_ids: Tensor
    """``(K,)`` int64."""
    offsets: Tensor
    """``(B + 1,)`` int64."""


def pack_hypotheses(hypotheses: Sequence[Tensor]) -> Hypotheses:
    """Rows of the hypotheses of a batch, one list of class ids ``(|H|,)`` an image."""
    lengths = torch.tensor([0, *(len(h) for h in hypotheses)])
    return Hypotheses(torch.cat([h.to("cpu", torch.int64) for h in hypotheses]), lengths.cumsum(0))


def pool_hypotheses(
    mask_logits: MaskLogits, features: Tensor, hypotheses: Hypotheses, valid: Tensor, tau: float, hard: bool
) -> PooledHypotheses:
    """Sample masks by Eq. (5) and average the features under the masks of each image's hypothesis.

    One fused operator subtracts the bias, samples and pools: :func:`~reclip_d2.layers.rectify_and_pool`. Features of
    padding are zeroed first. They still count in the area, which scales a row: Eq. (7) compares directions only.

    Args:
        mask_logits: M_o.
        features: Z ``(B, D, h, w)``, of the same grid.
        hypotheses: H of each image.
        valid: ``(B, n)`` bool, False for patches of padding. On the CPU, where asking whether there is any padding
            does not wait for a GPU.
        tau: temperature tau_1 of the masks.
        hard: one-hot masks with the straight-through gradient; else soft masks.

    Returns:
        one row for each class of each hypothesis.
    """
    logits = mask_logits.logits.flatten(2).transpose(1, 2)  # (B, n, C), a view
    patches = features.flatten(2).transpose(1, 2)  # (B, n, D)
    if not bool(valid.all()):
        patches = patches * valid.to(patches.device, non_blocking=True)[..., None]
    pooled, area = rectify_and_pool(logits, mask_logits.bias, patches.contiguous(), *hypotheses, tau, hard)
    rows = (index.to(pooled.device, non_blocking=True) for index in hypotheses)
    return PooledHypotheses(pooled, area, *rows)
