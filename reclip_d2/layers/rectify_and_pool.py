"""Rectification, Gumbel-Softmax masks and masked average pooling in one operator: Eqs. (3), (5), and pooling for (7).

Shapes: B images, n = h*w patches, D embedding width, C classes, K hypothesis rows (all images together).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from reclip_d2.layers._checks import (
    accumulate_dtype,
    check_float,
    check_hypothesis,
    check_index_tensors,
    check_same,
    check_seed,
    check_tau,
    rows_together,
)
from reclip_d2.layers._extension import extension_loaded, kernels_enabled
from reclip_d2.layers.gumbel_softmax import gumbel_softmax_reference
from reclip_d2.layers.masked_average_pool import masked_average_pool_reference
from reclip_d2.layers.philox import NoiseCounter, gumbel_noise, seed_for


def rectify_and_pool(
    logits: Tensor,
    bias: Tensor | None,
    features: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    tau: float,
    hard: bool = True,
    seed: Tensor | NoiseCounter | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool the features under masks sampled from rectified logits, for the hypothesis classes of each image.

    Equivalent to ``masked_average_pool(features, gumbel_softmax(logits - bias, tau, hard, seed), class_ids, offsets)``:
    the rectified logits M = M_q - M_b of Eq. (3), the masks softmax(M / tau + g) of Eq. (5), and the masked average
    of Eq. (7). Soft masks are averaged in log space, so that rows and gradients are correct even where a mask
    underflows in float32. The kernels never write masks or noise of size (B, n, C): the backward pass recomputes them
    from ``seed``.

    Args:
        logits: M_q or mask logits (B, n, C), any strides: pass the (B, C, h, w) output of a convolution as
            ``flatten(2).transpose(1, 2)``, a view; its gradient has the same strides.
        bias: M_b (n, C), subtracted from every image's logits; None for none.
        features: Z (B, n, D); copied first unless D is the innermost, contiguous dimension.
        class_ids: int64 (K,), class ids in 0 .. C-1, distinct within an image; on the CPU, where they are checked, or
            with the logits (see :func:`masked_average_pool`).
        offsets: int64 (B+1,), non-decreasing from 0 to at most K: rows offsets[b] .. offsets[b+1]-1 belong to image b,
            rows from offsets[B] on are padding, with results of zero.
        tau: temperature tau_1 of the logits, positive; it does not divide the noise (see :func:`gumbel_softmax`).
        hard: one-hot masks with the straight-through gradient; otherwise soft masks.
        seed: int64 tensor (2,) that addresses the noise, on the CPU or with the logits; a
            :class:`~reclip_d2.layers.philox.NoiseCounter`, which gives one; None draws one with :func:`draw_seed`.

    Returns:
        pooled (K, D) and area (K,), both float32 (float64 for float64 input). A row of area 0 is zero, and ``pooled``
        passes no gradient. Only hard masks can have area 0: areas of soft masks are clamped to the smallest normal
        number. If a patch has a non-finite score, all rows of its image and their areas are NaN
        (:func:`nonfinite_images` names the images), and the patch gets a gradient of zero, so that NaN does not spread.

    Raises:
        TypeError, ValueError: for invalid dtypes, shapes, devices, hypothesis rows, tau or seed.
    """
    op = "rectify_and_pool"
    check_float(op, "logits", logits, "B,n,C")
    check_float(op, "features", features, "B,n,D")
    check_same(op, "features", features, "logits", logits)
    if features.shape[:2] != logits.shape[:2]:
        raise ValueError(f"{op}: `logits` {tuple(logits.shape)} and `features` {tuple(features.shape)} differ in (B,n)")
    if bias is not None:
        check_float(op, "bias", bias, "n,C")
        check_same(op, "bias", bias, "logits", logits)
        if bias.shape != logits.shape[1:]:
            raise ValueError(f"{op}: `bias` {tuple(bias.shape)} must be (n,C) = {tuple(logits.shape[1:])}")
        bias = bias.to(accumulate_dtype(bias.dtype))
    check_index_tensors(op, class_ids, offsets, logits.shape[0])
    tau = check_tau(op, tau)
    class_ids, offsets = rows_together(class_ids, offsets, logits.device)
    seed = check_seed(op, seed_for(seed), logits.device)
    if kernels_enabled(logits.device.type):
        return torch.ops.reclip_d2.rectify_and_pool(logits, bias, features, class_ids, offsets, seed, tau, hard)
    check_hypothesis(op, class_ids, offsets, logits.shape[2])
    return rectify_and_pool_reference(logits, bias, features, class_ids, offsets, tau, hard, seed)


def rectify_and_pool_reference(
    logits: Tensor,
    bias: Tensor | None,
    features: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    tau: float,
    hard: bool,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Plain-PyTorch twin of :func:`rectify_and_pool`, with the same noise: reference for the tests, and fallback."""
    rectified = logits.to(accumulate_dtype(logits.dtype))
    if bias is not None:
        rectified = rectified - bias.to(rectified.dtype)
    if not hard and logits.shape[1] > 0:
        return _pool_soft_masks(rectified, features, class_ids, offsets, tau, seed)
    masks = gumbel_softmax_reference(rectified, tau, hard, seed)
    return masked_average_pool_reference(features, masks, class_ids, offsets)


def _pool_soft_masks(
    rectified: Tensor, features: Tensor, class_ids: Tensor, offsets: Tensor, tau: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Average the features under soft masks, from the logarithms of the masks."""
    dtype = rectified.dtype
    with torch.autocast(features.device.type, enabled=False):
        scores = rectified * (1.0 / tau) + gumbel_noise(rectified.shape, seed, rectified.device, dtype)
        finite = torch.isfinite(scores).all(dim=-1, keepdim=True)
        log_masks = torch.where(finite, torch.log_softmax(torch.where(finite, scores, 0.0), dim=-1), 0.0)
        pooled, area, bounds = [], [], offsets.tolist()
        for image, (start, stop) in enumerate(pairwise(bounds)):
            rows = log_masks[image].index_select(1, class_ids[start:stop].to(log_masks.device)).t()
            poison = torch.where(finite[image].all(), 0.0, float("nan"))  # added, to keep the gradient of the area
            pooled.append(torch.where(poison.isnan(), poison, rows.softmax(dim=1) @ features[image].to(dtype)))
            area.append(rows.logsumexp(dim=1).exp().clamp(min=torch.finfo(dtype).tiny) + poison.to(dtype))
        padding = class_ids.shape[0] - bounds[-1]
        pooled.append(features.new_zeros((padding, features.shape[2]), dtype=dtype))
        area.append(features.new_zeros((padding,), dtype=dtype))
        return torch.cat(pooled), torch.cat(area)


def _fake(
    logits: Tensor,
    bias: Tensor | None,
    features: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    seed: Tensor,
    tau: float,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    rows, dtype = class_ids.shape[0], accumulate_dtype(logits.dtype)
    return features.new_empty((rows, features.shape[2]), dtype=dtype), features.new_empty((rows,), dtype=dtype)


def _fake_forward(
    logits: Tensor,
    bias: Tensor | None,
    features: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    seed: Tensor,
    tau: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pooled, area = _fake(logits, bias, features, class_ids, offsets, seed, tau, hard)
    return pooled, area, pooled.new_empty((2, *logits.shape[:2]))


def _fake_backward(
    grad_pooled: Tensor,
    grad_area: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    features: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    seed: Tensor,
    pooled: Tensor,
    area: Tensor,
    tau: float,
    hard: bool,
    need_logits: bool,
    need_bias: bool,
    need_features: bool,
    normalizer: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(logits) if need_logits else logits.new_empty((0,)),
        torch.empty_like(bias) if need_bias and bias is not None else pooled.new_empty((0,)),
        features.new_empty(features.shape if need_features else (0,)),
    )


if extension_loaded():
    torch.library.register_fake("reclip_d2::rectify_and_pool", _fake)
    torch.library.register_fake("reclip_d2::rectify_and_pool_forward", _fake_forward)
    torch.library.register_fake("reclip_d2::rectify_and_pool_backward", _fake_backward)
