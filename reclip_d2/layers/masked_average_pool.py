"""Masked average pooling of image features over the mask of each hypothesis class, for Eq. (7) of the ReCLIP++ paper.

Shapes: B images, n = h*w patches, D embedding width, C classes, K hypothesis rows (all images together).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from reclip_d2.layers._checks import (
    accumulate_dtype,
    check_float,
    check_hypothesis,
    check_index_tensors,
    check_same,
    rows_together,
)
from reclip_d2.layers._extension import extension_loaded, kernels_enabled

# Smaller areas count as empty: dividing by them may overflow in float32. csrc/common.h has the same number.
SMALL_AREA = 1e-30


def masked_average_pool(features: Tensor, masks: Tensor, class_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Average the features under the masks of each image's hypothesis classes.

    Row r with offsets[b] <= r < offsets[b+1] belongs to image b and its class class_ids[r]:
    ``area[r] = sum_n masks[b, n, k]`` and ``pooled[r] = sum_n masks[b, n, k] features[b, n] / area[r]``.
    Rows from offsets[B] on are padding, to a fixed K: their results are zero, and nothing depends on them.

    Args:
        features: Z (B, n, D), float64, float32, float16 or bfloat16.
        masks: (B, n, C), any strides.
        class_ids: int64 (K,), class ids in 0 .. C-1, distinct within an image; on the CPU, where they are checked, or
            with the features. On a GPU the host does not read them, so that a CUDA graph may contain the operator: rows
            of an image with invalid ids become NaN, all rows if the offsets are invalid.
        offsets: int64 (B+1,), non-decreasing from 0 to at most K, on the device of ``class_ids``.

    Returns:
        pooled (K, D) and area (K,), both float32 (float64 for float64 input). An area between 0 and 1e-30 counts as 0:
        float32 cannot divide by it. A row of area 0 is zero, and ``pooled`` passes no gradient. NaN masks make the area
        and the row NaN, without gradient: see :func:`nonfinite_images`.

    Raises:
        TypeError, ValueError: for invalid dtypes, shapes, devices or hypothesis rows.
    """
    op = "masked_average_pool"
    check_float(op, "features", features, "B,n,D")
    check_float(op, "masks", masks, "B,n,C")
    check_same(op, "masks", masks, "features", features)
    if features.shape[:2] != masks.shape[:2]:
        raise ValueError(f"{op}: `features` {tuple(features.shape)} and `masks` {tuple(masks.shape)} differ in (B,n)")
    check_index_tensors(op, class_ids, offsets, features.shape[0])
    class_ids, offsets = rows_together(class_ids, offsets, features.device)
    if kernels_enabled(features.device.type):
        return torch.ops.reclip_d2.masked_average_pool(features, masks, class_ids, offsets)
    check_hypothesis(op, class_ids, offsets, masks.shape[2])
    return masked_average_pool_reference(features, masks, class_ids, offsets)


def masked_average_pool_reference(
    features: Tensor, masks: Tensor, class_ids: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain-PyTorch twin of :func:`masked_average_pool`: reference for the tests, and fallback."""
    dtype = accumulate_dtype(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        bounds = offsets.tolist()
        sums, areas = [], []
        for image, (start, stop) in enumerate(pairwise(bounds)):
            columns = class_ids[start:stop].to(masks.device)
            rows = masks[image].index_select(1, columns).to(dtype).t()
            # NaN masks make the area NaN; the product leaves them out, so that no gradient is NaN.
            sums.append(torch.where(rows.isnan(), 0.0, rows) @ features[image].to(dtype))
            areas.append(rows.sum(dim=1))
        padding = class_ids.shape[0] - bounds[-1]
        total = torch.cat([*sums, features.new_zeros((padding, features.shape[2]), dtype=dtype)])
        area = torch.cat([*areas, features.new_zeros((padding,), dtype=dtype)])
        small = (area > 0) & (area < SMALL_AREA)
        area = area - torch.where(small, area, 0.0).detach()  # exactly 0; its gradient stays
        used = (area > 0).unsqueeze(1)
        # Two `where`s: the first keeps 0/0 out of the backward pass, the second copies NaN areas to the row.
        pooled = torch.where(used, total, 0.0) / torch.where(used, area.unsqueeze(1), 1.0)
        return torch.where(area.isnan().unsqueeze(1), float("nan"), pooled), area


def nonfinite_images(area: Tensor, offsets: Tensor) -> list[int]:
    """Images whose mask logits contain NaN or infinity, found by the areas that the pooling returned.

    The kernels mark each row of such an image with a NaN area, without synchronising with the GPU. This function does
    synchronise: call it after a loss was not finite, to name the images.

    Args:
        area: (K,) from :func:`masked_average_pool` or :func:`rectify_and_pool`.
        offsets: int64 (B+1,), as passed to it.

    Returns:
        Indices in the batch, ascending.
    """
    bounds = offsets.tolist()
    bad = (~torch.isfinite(area.detach())).cpu()
    return [b for b, (start, stop) in enumerate(pairwise(bounds)) if bool(bad[start:stop].any())]


def _fake(features: Tensor, masks: Tensor, class_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, dtype = class_ids.shape[0], accumulate_dtype(features.dtype)
    return features.new_empty((rows, features.shape[2]), dtype=dtype), features.new_empty((rows,), dtype=dtype)


def _fake_backward(
    grad_pooled: Tensor,
    grad_area: Tensor,
    features: Tensor,
    masks: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    pooled: Tensor,
    area: Tensor,
    need_features: bool,
    need_masks: bool,
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if need_features else (0,)),
        torch.empty_like(masks) if need_masks else masks.new_empty((0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_pooled: Tensor, grad_area: Tensor) -> tuple[Tensor | None, ...]:
    need_features, need_masks = ctx.needs_input_grad[:2]
    grad_features, grad_masks = torch.ops.reclip_d2.masked_average_pool_backward(
        grad_pooled, grad_area, *ctx.saved_tensors, need_features, need_masks
    )
    return grad_features if need_features else None, grad_masks if need_masks else None, None, None


if extension_loaded():
    torch.library.register_fake("reclip_d2::masked_average_pool", _fake)
    torch.library.register_fake("reclip_d2::masked_average_pool_backward", _fake_backward)
    torch.library.register_autograd("reclip_d2::masked_average_pool", _backward, setup_context=_setup_context)
