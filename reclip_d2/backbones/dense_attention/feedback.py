"""Feedback of predicted labels into the last block's attention, in a second pass.

Shape letters: (h, w) patch grid, n = h*w patches, T class tokens and patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from reclip_d2.backbones.dense_attention.base import AttentionInput, DenseAttention

Rows = Callable[[slice], Tensor]
"""Additional scores ``(rows, T)`` of some patches, by their slice."""


@dataclasses.dataclass(frozen=True)
class Feedback:
    """A change of attention scores s, the same for all heads: ``gain s + bias``, before any other bias.

    Attributes:
        gain: factor of the scores.
        rows: bias ``(rows, n)`` of some patches towards all patches; class tokens get none.
    """

    gain: float
    rows: Callable[[slice], Tensor]

    def added_to(self, bias: Rows | None, class_tokens: int) -> Rows:
        """The bias ``(rows, T)`` and another one."""

        def both(rows: slice) -> Tensor:
            own = F.pad(self.rows(rows), [class_tokens, 0])
            return own if bias is None else own + bias(rows).to(own)

        return both


class AttentionWithFeedback:
    """A dense attention that :attr:`~DenseAttention.takes_feedback`, with feedback on one image."""

    def __init__(self, attention: DenseAttention, feedback: Feedback) -> None:
        self.attention = attention
        self.feedback = feedback

    def earlier_blocks(self, count: int) -> Sequence[int]:
        """See :meth:`DenseAttention.earlier_blocks`."""
        return self.attention.earlier_blocks(count)

    def run_earlier(self, *arguments: Any) -> tuple[Tensor, Tensor] | None:
        """See :meth:`DenseAttention.run_earlier`."""
        return self.attention.run_earlier(*arguments)

    def __call__(self, inputs: AttentionInput) -> Tensor:
        """See :meth:`DenseAttention.forward`."""
        return self.attention(dataclasses.replace(inputs, feedback=self.feedback))

    def refine(self, features: Tensor, inputs: AttentionInput) -> Tensor:
        """See :meth:`DenseAttention.refine`."""
        return self.attention.refine(features, inputs)
