"""Cross entropy of bilinearly upsampled class logits against a label map, in one pass: Eq. (8).

Shapes: B images, C classes, h x w the logits' grid, H x W the label map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.layers._checks import accumulate_dtype, check_pixels
from reclip_d2.layers._extension import extension_loaded, kernels_enabled

IGNORED = -1  # the label of pixels that do not count, as upsample_argmax gives for scores that are not finite


def upsample_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels of ``-log softmax(logits)[label]`` after bilinear resizing of the logits to the
    label map, without a (B, C, H, W) tensor.

    Equals ``F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear", align_corners=False), labels,
    ignore_index=-1)``, image by image. The kernels keep two numbers per pixel for the backward pass.

    Args:
        logits: (B, C, h, w), any strides, float64, float32, float16 or bfloat16 (computed in float32 at least).
        labels: (B, H, W) int64 in 0 .. C-1, or -1 for pixels that do not count.

    Returns:
        loss (B,), float32 (float64 for float64 input); 0 for an image without labels. NaN for an image where an
        interpolated score of a labelled pixel is not finite.

    Raises:
        TypeError, ValueError: for dtypes, shapes or devices that do not fit.
        IndexError, ValueError: for other labels, on the CPU. CUDA kernels make the image's loss NaN instead: the host
            does not wait for them.
    """
    op = "upsample_cross_entropy"
    check_pixels(op, "logits", logits, "labels", labels, torch.int64)
    if kernels_enabled(logits.device.type):
        return torch.ops.reclip_d2.upsample_cross_entropy(logits, labels.contiguous())[0]
    return upsample_cross_entropy_reference(logits, labels)


def upsample_cross_entropy_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain-PyTorch twin of :func:`upsample_cross_entropy`: the tests' oracle and the fallback."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    with torch.autocast(logits.device.type, enabled=False):
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return loss.sum((1, 2)) / (labels != IGNORED).sum((1, 2)).clamp(min=1)


def _fake(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(logits.dtype)
    images, *size = labels.shape
    return (
        logits.new_empty((images,), dtype=dtype),
        logits.new_empty((images,), dtype=dtype),
        logits.new_empty((2, images, *size), dtype=dtype),
    )


def _fake_backward(grad_loss: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, normalizer: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, normalizer = output
    ctx.mark_non_differentiable(weight, normalizer)
    ctx.set_materialize_grads(False)  # no zeros of the size of the normalizer
    ctx.save_for_backward(*inputs, weight, normalizer)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_loss is None:
        return None, None
    return torch.ops.reclip_d2.upsample_cross_entropy_backward(grad_loss, *ctx.saved_tensors), None


if extension_loaded():
    torch.library.register_fake("reclip_d2::upsample_cross_entropy", _fake)
    torch.library.register_fake("reclip_d2::upsample_cross_entropy_backward", _fake_backward)
    torch.library.register_autograd("reclip_d2::upsample_cross_entropy", _backward, setup_context=_setup_context)
