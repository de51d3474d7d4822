"""Frozen weights: where they allow layers of fewer launches, and copies of them in autocast's precision, made once.

Autocast keeps its copies of a weight only if the weight trains; those of a frozen tower are converted at each call: two
launches a layer.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


def is_on_gpu(x: Tensor) -> bool:
    """Whether launches count: any device but the CPU."""
    return x.device.type != "cpu"


def is_frozen_on_gpu(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a layer with these weights runs on a GPU, frozen, and neither traced nor compiled.

    It may then be computed in fewer launches, with results that differ by rounding.
    """
    return (
        is_on_gpu(x)
        and not any(weight is not None and weight.requires_grad for weight in weights)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


@dataclasses.dataclass
class _Copy:
    version: int
    storage: int
    tensor: Tensor


_NAME = "_reclip_autocast_copy"  # attribute of the weight: goes with it, and is in no state dict


def autocast_copy(weight: Tensor | None) -> Tensor | None:
    """What autocast makes of a float32 weight: the same numbers in its precision, from a copy that is kept.

    The weight itself where autocast is off, or would do nothing; where the weight trains; and in traced or compiled
    programs. The copy follows changes of the weight in place (unless made through ``.data``) without moving, so that a
    CUDA graph may read it.

    Args:
        weight: a parameter or buffer, not a part of one; None for None.
    """
    if weight is None or weight.is_meta or not torch.is_autocast_enabled(weight.device.type):
        return weight
    if not _may_be_copied(weight):
        return weight
    dtype = torch.get_autocast_dtype(weight.device.type)
    found: _Copy | None = getattr(weight, _NAME, None)
    if found is not None and (found.tensor.dtype, found.storage) == (dtype, weight.data_ptr()):
        if found.version != weight._version:
            with torch.no_grad():
                found.tensor.copy_(weight)
            found.version = weight._version
        return found.tensor
    with torch.inference_mode(False), torch.no_grad():
        copy = weight.to(dtype)
    if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):  # it would have no values before a replay
        setattr(weight, _NAME, _Copy(weight._version, weight.data_ptr(), copy))
    return copy


def _may_be_copied(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and not weight.requires_grad
        and type(weight) in (Tensor, nn.Parameter)
        and not weight.is_inference()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )
