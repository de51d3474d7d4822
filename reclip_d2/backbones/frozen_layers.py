"""Layers of the frozen towers: by :func:`~reclip_d2.layers.frozen_linear.frozen_linear`, and on a GPU in fewer launches
than torch's and open_clip's.

Shape letters: B sequences, T tokens, E width of the transformer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from reclip_d2.layers.frozen_linear import frozen_linear, uses_onednn
from reclip_d2.layers.frozen_weights import autocast_copy, is_frozen_on_gpu


class FrozenLinear(nn.Linear):
    """``nn.Linear`` by :func:`frozen_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


class FrozenMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` by :func:`frozen_linear`, for the attention of a sequence to itself: without torch's
    three copies of its inputs and outputs."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``; the weights are None with ``need_weights=False``."""
        if not self._is_plain(query, key, value, options):
            return super().forward(query, key, value, **options)
        parts = frozen_linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts]
        mask = options.get("attn_mask")
        mask = mask if mask is None else mask.to(heads[0].dtype)
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return frozen_linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _is_plain(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
        """Whether this is self-attention of ``(B, T, E)`` that oneDNN or a GPU computes, without any of the module's
        options but an additive mask ``(T, T)``."""
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
            and (
                uses_onednn(query, self.in_proj_weight, self.in_proj_bias)
                or is_frozen_on_gpu(query, self.in_proj_weight, self.in_proj_bias, *self.out_proj.parameters())
            )
        )


class FrozenQuickGeluMlp(nn.Sequential):
    """open_clip's MLP with ``QuickGELU(x) = x sigmoid(a x)``, a = 1.702; on a GPU with ``SiLU(a x) / a``, which is the
    same: one launch in place of three, since the products take the factors."""

    SCALE = 1.702

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.c_fc, self.c_proj
        if x.ndim < 2 or None in (first.bias, last.bias) or not is_frozen_on_gpu(x, *self.parameters()):
            return super().forward(x)
        weights = first.weight, self._scaled_bias(first.bias), last.weight, last.bias
        rows = _QuickGeluMlp.apply(x.flatten(0, -2), *map(autocast_copy, weights), self.SCALE)
        return rows.unflatten(0, x.shape[:-1])

    def _scaled_bias(self, bias: Tensor) -> Tensor:
        """``a b``, made once for a state of b; a buffer of no state dict."""
        state = (bias.data_ptr(), bias._version, bias.device, bias.dtype)
        if getattr(self, "_bias_state", None) != state:
            with torch.inference_mode(False), torch.no_grad():
                scaled = self.SCALE * bias
            if bias.is_cuda and torch.cuda.is_current_stream_capturing():
                return scaled
            kept = getattr(self, "_kept_bias", None)
            if kept is not None and kept.device == scaled.device and kept.dtype == scaled.dtype:
                kept.copy_(scaled)  # in its place: a CUDA graph may hold it
            else:
                self._kept_bias = scaled
            self._bias_state = state
        return self._kept_bias


class _QuickGeluMlp(torch.autograd.Function):
    """``W' SiLU(a (W x + b)) / a + b'`` for x ``(N, E)``, with the gradient of x only, in which the factors cancel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scaled_bias: Tensor, last_weight: Tensor, last_bias: Tensor, scale: float
    ) -> Tensor:
        hidden = torch.addmm(scaled_bias, x, weight.t(), alpha=scale)
        ctx.save_for_backward(weight, last_weight, hidden)
        return torch.addmm(last_bias, F.silu(hidden), last_weight.t(), alpha=1 / scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, last_weight, hidden = ctx.saved_tensors
        inner = torch.ops.aten.silu_backward(gradient @ last_weight.to(hidden.dtype), hidden)
        return inner @ weight.to(hidden.dtype), None, None, None, None, None


def use_frozen_layers(model: nn.Module) -> None:
    """Make the linear layers and attentions of a model frozen ones, in place; parameters and their names stay.

    Layers whose weights need gradients compute what they did before.
    """
    frozen = {nn.Linear: FrozenLinear, nn.MultiheadAttention: FrozenMultiheadAttention}
    for module in model.modules():
        if type(module) in frozen:
            module.__class__ = frozen[type(module)]
        elif type(module) is nn.Sequential and [*module._modules] == ["c_fc", "gelu", "c_proj"]:
            if type(module.gelu) is QuickGELU:
                module.__class__ = FrozenQuickGeluMlp
