"""L1 distance of two bilinearly upsampled feature maps, in one pass: Eq. (9).

Shapes: B images, D channels, h x w and h' x w' the maps' grids, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reclip_d2.layers._checks import accumulate_dtype, check_pixels, check_same
from reclip_d2.layers._extension import extension_loaded, kernels_enabled


def upsample_l1(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid pixels of ``sum_d |student_d - teacher_d|`` after bilinear resizing of both maps to the size
    of ``valid``, without a (B, D, H, W) tensor.

    Equals ``F.interpolate(..., mode="bilinear", align_corners=False)`` of both, and the mean of their distance. A map
    that has the size of ``valid`` is taken as it is. The kernels interpolate again in the backward pass: of the pixels'
    size only ``valid`` is kept.

    Args:
        student: (B, D, h, w), any strides, float64, float32, float16 or bfloat16 (computed in float32 at least).
        teacher: (B, D, h', w'); its dtype may differ, but float64 does not mix with the others.
        valid: (B, H, W) bool, False for pixels that do not count.

    Returns:
        loss (B,), float32 (float64 for float64 input); 0 for an image without valid pixels. NaN where a map is not
        finite. Its gradient is sign(student - teacher), 0 at equality, for both maps.

    Raises:
        TypeError, ValueError: for dtypes, shapes or devices that do not fit.
    """
    op = "upsample_l1"
    check_pixels(op, "student", student, "valid", valid, torch.bool)
    check_pixels(op, "teacher", teacher, "valid", valid, torch.bool)
    check_same(op, "teacher", teacher, "student", student)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"{op}: `student` {tuple(student.shape)} and `teacher` {tuple(teacher.shape)} differ in D")
    if kernels_enabled(student.device.type):
        return torch.ops.reclip_d2.upsample_l1(student, teacher, valid.contiguous())[0]
    return upsample_l1_reference(student, teacher, valid)


def upsample_l1_reference(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Plain-PyTorch twin of :func:`upsample_l1`: the tests' oracle and the fallback.

    One image at a time, and the resized maps are made again in the backward pass: a batch of 12 crops of 520 px at
    D = 512 is 6.7 GB.
    """
    dtype = accumulate_dtype(student.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    with torch.autocast(student.device.type, enabled=False):
        options = {"use_reentrant": False, "preserve_rng_state": False}
        losses = [
            checkpoint(_mean_distance, student[b : b + 1], teacher[b : b + 1], valid[b], **options)
            for b in range(len(student))
        ]
    return torch.stack(losses) if losses else student.new_zeros((0,))


def _mean_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Of one image, (1, D, h, w) and (1, D, h', w')."""
    size = tuple(valid.shape)
    student, teacher = (
        x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        for x in (student, teacher)
    )
    distance = (student - teacher).abs().sum(1)[0]
    return (distance * valid).sum() / valid.sum().clamp(min=1)


def _fake(student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(student.dtype)
    return student.new_empty((student.shape[0],), dtype=dtype), student.new_empty((student.shape[0],), dtype=dtype)


def _fake_backward(grad_loss: Tensor, student: Tensor, teacher: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(student)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    loss, weight = output
    ctx.mark_non_differentiable(weight)
    ctx.save_for_backward(*inputs, weight)


def _backward(ctx: Any, grad_loss: Tensor, grad_weight: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    student, teacher, valid, weight = ctx.saved_tensors
    backward = torch.ops.reclip_d2.upsample_l1_backward
    return (  # the distance is symmetric
        backward(grad_loss, student, teacher, valid, weight) if ctx.needs_input_grad[0] else None,
        backward(grad_loss, teacher, student, valid, weight) if ctx.needs_input_grad[1] else None,
        None,
    )


if extension_loaded():
    torch.library.register_fake("reclip_d2::upsample_l1", _fake)
    torch.library.register_fake("reclip_d2::upsample_l1_backward", _fake_backward)
    torch.library.register_autograd("reclip_d2::upsample_l1", _backward, setup_context=_setup_context)
