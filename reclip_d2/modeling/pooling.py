"""From mask logits and hypotheses to the pooled features of Eq. (7).

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) patch grid, K hypothesis
rows (all images together; row r belongs to image b when ``offsets[b] <= r < offsets[b + 1]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.layers import NoiseCounter, rectify_and_pool
from reclip_d2.modeling.bias_head import rectified_logits


class MaskLogits(NamedTuple):
    """Mask logits ``logits - bias``, kept as two terms: :func:`pool_hypotheses` subtracts on the fly."""

    logits: Tensor
    """``(B, C, h, w)``."""
    bias: Tensor | None = None
    """``(n, C)``, shared by all images; None for zero."""

    def tensor(self) -> Tensor:
        """The difference ``(B, C, h, w)``."""
        return rectified_logits(self.logits, self.bias)


class Hypotheses(NamedTuple):
    """Hypothesis classes of a batch as ragged rows: on the CPU, where the pooling operators check them, or on the
    features' device."""

    class_ids: Tensor
    """``(K,)`` int64."""
    offsets: Tensor
    """``(B + 1,)`` int64, non-decreasing from 0; rows from ``offsets[B]`` on are padding."""


class PooledHypotheses(NamedTuple):
    """Masked average-pooled features of the hypothesis rows, with the rows' indices; on the features' device."""

    features: Tensor
    """Z_g ``(K, D)``."""
    area: Tensor
    """``(K,)`` mask areas in patches, padding included."""
    class_ids: Tensor
    """``(K,)`` int64."""
    offsets: Tensor
    """``(B + 1,)`` int64."""


def pack_hypotheses(hypotheses: Sequence[Tensor], rows: int = 0) -> Hypotheses:
    """Pack the hypotheses of a batch, class ids ``(|H|,)`` per image, into ragged rows, on the CPU.

    Args:
        rows: K, with rows of padding after those of the images; 0 for none.

    Raises:
        ReclipError: there are more than ``rows``.
    """
    lengths = torch.tensor([0, *(len(h) for h in hypotheses)])
    class_ids = torch.cat([h.to("cpu", torch.int64) for h in hypotheses])
    if rows and len(class_ids) > rows:
        raise ReclipError(f"the hypotheses of the batch have {len(class_ids)} classes, more than the {rows} rows")
    padding = max(rows - len(class_ids), 0)
    return Hypotheses(F.pad(class_ids, (0, padding)) if padding else class_ids, lengths.cumsum(0))


def pool_hypotheses(
    mask_logits: MaskLogits,
    features: Tensor,
    hypotheses: Hypotheses,
    valid: Tensor | None,
    tau: float,
    hard: bool,
    noise: Tensor | NoiseCounter | None = None,
) -> PooledHypotheses:
    """Sample masks by Eq. (5) and average the features under the masks of each image's hypothesis.

    One fused operator subtracts the bias, samples and pools: :func:`~reclip_d2.layers.rectify_and_pool`. Features of
    padding are set to zero first. Padding still counts in the area, which only scales a row: Eq. (7) compares
    directions.

    Args:
        mask_logits: M_o.
        features: Z ``(B, D, h, w)``, on the same grid.
        hypotheses: H of each image.
        valid: ``(B, n)`` bool, False for patches of padding; None without padding.
        tau: temperature tau_1 of the masks.
        hard: one-hot masks with the straight-through gradient; otherwise soft masks.
        noise: ``seed`` of :func:`~reclip_d2.layers.rectify_and_pool`.

    Returns:
        one row for each class of each hypothesis, then the rows of padding.
    """
    logits = mask_logits.logits.flatten(2).transpose(1, 2)  # (B, n, C), a view
    patches = features.flatten(2).transpose(1, 2)  # (B, n, D)
    if valid is not None:
        patches = patches * valid.to(patches.device, non_blocking=True)[..., None]
    pooled, area = rectify_and_pool(logits, mask_logits.bias, patches.contiguous(), *hypotheses, tau, hard, noise)
    rows = (index.to(pooled.device, non_blocking=True) for index in hypotheses)
    return PooledHypotheses(pooled, area, *rows)
