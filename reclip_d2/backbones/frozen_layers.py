"""Layers of the frozen towers that use :func:`~reclip_d2.layers.frozen_linear.frozen_linear`.

Shape letters: B sequences, T tokens, E width of the transformer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.layers.frozen_linear import frozen_linear, uses_onednn


class FrozenLinear(nn.Linear):
    """``nn.Linear`` by :func:`frozen_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


class FrozenMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` by :func:`frozen_linear`, for the attention of a sequence to itself."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``; the weights are None with ``need_weights=False``."""
        if not self._is_plain(query, key, value, options):
            return super().forward(query, key, value, **options)
        parts = frozen_linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=options.get("attn_mask"))
        return frozen_linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _is_plain(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
        """Whether this is self-attention of ``(B, T, E)`` that oneDNN computes, without any of the module's options
        but an additive mask ``(T, T)``."""
        mask = options.get("attn_mask")
        return (
            query is key is value
            and query.ndim == 3
            and self.batch_first
            and self.in_proj_weight is not None
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.training and self.dropout)
            and not options.get("need_weights", True)
            and options.get("key_padding_mask") is None
            and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
            and uses_onednn(query, self.in_proj_weight, self.in_proj_bias)
        )


def use_frozen_layers(model: nn.Module) -> None:
    """Make the linear layers and attentions of a model frozen ones, in place; parameters and their names stay.

    Layers whose weights need gradients compute what they did before.
    """
    frozen = {nn.Linear: FrozenLinear, nn.MultiheadAttention: FrozenMultiheadAttention}
    for module in model.modules():
        if type(module) in frozen:
            module.__class__ = frozen[type(module)]
