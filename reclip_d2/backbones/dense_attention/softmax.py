"""Common part of the attentions that are a soft-max over the last block's own tokens."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import AttentionInput, DenseAttention
from reclip_d2.backbones.dense_attention.feedback import Rows
from reclip_d2.backbones.dense_attention.rows import attend


class SoftmaxAttention(DenseAttention):
    """``output(A v)`` with an attention matrix A for each head over the block's tokens, class tokens included.

    Subclasses define :meth:`mixed_values`.

    Attributes:
        paper_residual: whether the paper keeps the block's residual connections and MLP around the attention.
    """

    options = {"residual": "MODEL.CLIP.ATTENTION_RESIDUAL"}
    paper_residual: bool = False
    takes_feedback = True

    def __init__(self, residual: str = "paper") -> None:
        """
        Args:
            residual: "keep" or "drop" the residual connections and the MLP, or do as the "paper".
        """
        super().__init__()
        self.residual = residual

    @property
    def uses_mlp(self) -> bool:
        return self.paper_residual if self.residual == "paper" else self.residual == "keep"

    @abc.abstractmethod
    def mixed_values(self, inputs: AttentionInput) -> Tensor:
        """``A v`` of the patches ``(B, n, E)``."""

    def forward(self, inputs: AttentionInput) -> Tensor:
        """The last block's output patches ``(B, n, E)``."""
        out = inputs.block.output(self.mixed_values(inputs))
        if not self.uses_mlp:
            return out
        out = inputs.patches + out
        return out + inputs.block.mlp(out)


def attend_to_block(
    inputs: AttentionInput, queries: Tensor, keys: Tensor, values: Tensor, bias: Rows | None = None
) -> Tensor:
    """:func:`~reclip_d2.backbones.dense_attention.rows.attend` for the patches: ``(B, G, n, d)``, with valid tokens as
    keys and with any feedback.

    Args:
        queries: ``(B, G, n, d)`` of the patches.
        keys, values: ``(B, G, T, d)``.
        bias: see :func:`~reclip_d2.backbones.dense_attention.rows.attend`.
    """
    feedback, valid = inputs.feedback, valid_tokens(inputs)
    if feedback is None:
        return attend(queries, keys, values, valid, bias)
    return attend(queries, keys, values, valid, feedback.added_to(bias, inputs.class_tokens), feedback.gain)


def valid_tokens(inputs: AttentionInput) -> Tensor | None:
    """``(B, T)`` bool: class tokens, and patches that are not padding; None if all are."""
    if inputs.valid is None:
        return None
    tokens = torch.ones_like(inputs.valid[:, : inputs.class_tokens])
    return torch.cat([tokens, inputs.valid], dim=1)
