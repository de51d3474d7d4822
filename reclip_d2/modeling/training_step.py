"""A training step as a function of tensors, so that a CUDA graph or ``torch.compile`` can hold it.

A model divides its losses into ``step_inputs``, which reads a batch of records on the host; ``encode``, which runs the
frozen image tower unless that is done; and ``step``, which computes the losses. The last two compute from tensors
alone: they read no value of a tensor on the host, and their shapes follow from those of their inputs.

Shape letters: B images, n = h*w patches, C classes, (h, w) patch grid, K hypothesis rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reclip_d2.backbones.interface import valid_patches
from reclip_d2.layers import NoiseCounter
from reclip_d2.modeling.pooling import Hypotheses, MaskLogits, pack_hypotheses


class StepInputs(NamedTuple):
    """Inputs of a training step."""

    tensors: dict[str, Tensor]
    """What differs between batches."""
    layout: Hashable
    """What a graph of the step depends on besides the tensors' shapes: plain values."""
    noise: Tensor | NoiseCounter | None = None
    """Seed of the Gumbel noise: see :func:`~reclip_d2.layers.rectify_and_pool`."""

    @property
    def hypotheses(self) -> Hypotheses:
        """The hypothesis rows."""
        return Hypotheses(self.tensors["class_ids"], self.tensors["offsets"])

    @property
    def valid(self) -> Tensor | None:
        """``(B, n)`` bool, False for patches of padding; None without padding."""
        return self.tensors.get("valid")


class StepOutputs(NamedTuple):
    """Results of a training step."""

    losses: dict[str, Tensor]
    """Weighted losses, scalars."""
    logits: MaskLogits
    """Mask logits, ``(B, C, h, w)``."""
    bias: Tensor | None = None
    """M_b, for pictures."""

    def detach(self) -> StepOutputs:
        """The values alone, without the autograd graph, whose nodes belong to the stream that they were made on."""
        losses = {name: value.detach() for name, value in self.losses.items()}
        logits, bias = (None if x is None else x.detach() for x in self.logits)
        return StepOutputs(losses, MaskLogits(logits, bias), None if self.bias is None else self.bias.detach())


def hypothesis_tensors(batched_inputs: Sequence[dict[str, Any]], rows: int) -> dict[str, Tensor]:
    """``class_ids`` and ``offsets`` of a batch, on the CPU; see :func:`~reclip_d2.modeling.pooling.pack_hypotheses`."""
    return pack_hypotheses([x["hypothesis"] for x in batched_inputs], rows)._asdict()


def padding_tensors(
    image_sizes: Sequence[tuple[int, int]], grid: tuple[int, int], stride: int, device: torch.device
) -> dict[str, Tensor]:
    """``valid`` of a batch, on ``device``; nothing if no patch is padding, which is decided on the host."""
    valid = valid_patches(image_sizes, grid, stride, torch.device("cpu"))
    return {} if bool(valid.all()) else {"valid": valid.to(device, non_blocking=True)}
