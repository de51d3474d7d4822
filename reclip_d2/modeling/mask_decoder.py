"""Mask decoder F_dec, Eq. (4).

Shape letters: B images, (h, w) patch grid, n = h*w patches, C classes, D width of the joint embedding, k side of the
convolution's kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from reclip_d2.layers import frozen_linear
from reclip_d2.modeling.build import build_norm
from reclip_d2.modeling.numerics import at_least_float32, full_precision
from reclip_d2.modeling.pooling import MaskLogits

INITS = ("default", "identity")


class MaskDecoder(nn.Module):
    """Eq. (4): ``M_o = F_dec(M, Z)``, a convolution of ``concat(Z, M)`` and a batch norm.

    A convolution is linear, so ``conv(concat(Z, M)) = conv(Z; W_z) + conv(M; W_m)``, where W_z and W_m are the slices
    of its weight for Z and M. A frozen Z needs no gradient, and none is computed.

    If all images share the bias M_b, M is linear in Z up to a constant map, ``M = Z W_q^T - M_b``, including its
    padding. Eqs. (3) and (4) then fold into one convolution of Z and one of a single map, exactly::

        conv(concat(Z, M)) = conv(Z; W_z + W_m W_q) - conv(M_b; W_m)

    :meth:`rectify_and_decode` computes this, with the batch norm as scale and shift; :meth:`forward` computes the
    literal form, for any norm and any bias. Parameters and results are the same.
    """

    @configurable
    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        kernel_size: int = 5,
        norm: str = "BN",
        padding_mode: str = "replicate",
        init: str = "default",
    ) -> None:
        """
        Args:
            embed_dim: D.
            num_classes: C.
            kernel_size: odd.
            norm: a name for Detectron2's ``get_norm``: BN, SyncBN, FrozenBN, GN (C a multiple of 32) or "".
            padding_mode: ``replicate`` or ``zeros``. Zeros lower the logits at the border, itself a space bias.
            init: ``default`` (PyTorch's), or ``identity``: before training the convolution returns M and ignores Z.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.padding = kernel_size // 2
        self.padding_mode = padding_mode
        self.conv = nn.Conv2d(embed_dim + num_classes, num_classes, kernel_size)
        self.norm = build_norm(norm, num_classes, "MODEL.MASK_DECODER.NORM")
        if init == "identity":
            with torch.no_grad():
                self.conv.weight.zero_()
                self.conv.bias.zero_()
                for k in range(num_classes):
                    self.conv.weight[k, embed_dim + k, self.padding, self.padding] = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, embed_dim: int, num_classes: int) -> dict[str, object]:
        return {
            "embed_dim": embed_dim,
            "num_classes": num_classes,
            "kernel_size": cfg.MODEL.MASK_DECODER.KERNEL_SIZE,
            "norm": cfg.MODEL.MASK_DECODER.NORM,
            "padding_mode": cfg.MODEL.MASK_DECODER.PADDING_MODE,
            "init": cfg.MODEL.MASK_DECODER.INIT,
        }

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        """Eq. (4): mask logits M_o ``(B, C, h, w)`` from rectified logits M ``(B, C, h, w)`` and features Z
        ``(B, D, h, w)``."""
        weight_z, weight_m = self._weights()
        out = self._conv(features, weight_z, self.conv.bias) + self._conv(logits, weight_m, None)
        return self.norm(at_least_float32(out))

    # ---- Eqs. (3) and (4) folded --------------------------------------------------------------------------------

    @property
    def folds(self) -> bool:
        """Whether :meth:`rectify_and_decode` can be used: the norm is a plain batch norm or none."""
        norm = self.norm
        plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
        return plain or isinstance(norm, nn.Identity)

    def folding_pays(self, images: int, patches: int) -> bool:
        """Whether :meth:`rectify_and_decode` is faster for a training batch of B images of n patches.

        The literal form convolves M over B n patches. The folded form convolves M_b over n patches, and the product
        W_m W_q costs as much as D more. The factor of 2 is measured: the product is slower per operation than a
        convolution.
        """
        return images * patches > 2 * (self.embed_dim + patches)

    @property
    def takes_statistics(self) -> bool:
        """Whether the norm uses batch statistics: folded weights then depend on the batch."""
        return isinstance(self.norm, nn.BatchNorm2d) and self.norm.training

    def rectify_and_decode(self, features: Tensor, query_features: Tensor, bias: Tensor | None) -> MaskLogits:
        """Eqs. (3) and (4) folded: ``forward(Z W_q^T - M_b, Z)`` as a difference, if the decoder :attr:`folds`.

        In training, the batch norm uses the statistics of the difference and updates its running statistics.

        Args:
            features: Z ``(B, D, h, w)``.
            query_features: W_q ``(C, D)``.
            bias: M_b ``(n, C)``; None for zero.

        Returns:
            M_o.
        """
        size = (features.shape[-2], features.shape[-1])
        if not self.takes_statistics:
            return MaskLogits(self.decode_folded(features, self.fold(query_features)), self.fold_bias(bias, size))
        logits = self.decode_folded(features, self._folded_weight(query_features))
        bias_map = self._bias_map(bias, size)
        scale, shift = _batch_norm_of_difference(self.norm, logits, bias_map)
        return MaskLogits(_per_class(scale) * logits, _as_bias(_per_class(scale) * bias_map - _per_class(shift)))

    def fold(self, query_features: Tensor) -> Tensor:
        """Weight ``(C, D, k, k)`` for :meth:`decode_folded`, outside training: includes W_q and the norm's scale."""
        weight, (scale, _) = self._folded_weight(query_features), self._scale_and_shift()
        return weight if scale is None else scale[:, None, None, None] * weight

    def fold_bias(self, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The map ``(n, C)`` to subtract from :meth:`decode_folded`, outside training, for M_b ``(n, C)`` on a grid."""
        bias_map, (scale, shift) = self._bias_map(bias, size), self._scale_and_shift()
        return _as_bias(bias_map if scale is None else _per_class(scale) * bias_map - _per_class(shift))

    def decode_folded(self, features: Tensor, weight: Tensor) -> Tensor:
        """Convolution ``(B, C, h, w)`` of Z ``(B, D, h, w)`` with a folded weight, float32 or wider."""
        return at_least_float32(self._conv(features, weight, None))

    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_z ``(C, D, k, k)`` and W_m ``(C, C, k, k)``."""
        weight_z, weight_m = self.conv.weight.split([self.embed_dim, self.conv.out_channels], dim=1)
        return weight_z, weight_m

    @full_precision
    def _folded_weight(self, query_features: Tensor) -> Tensor:
        """``W_z + W_m W_q`` ``(C, D, k, k)``."""
        weight_z, weight_m = self._weights()
        return weight_z + frozen_linear(weight_m.movedim(1, 3), query_features.T).movedim(3, 1)

    def _bias_map(self, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
        """``conv(M_b; W_m) - b`` ``(C, h, w)``, with b the bias parameter of the convolution."""
        constant = _per_class(self.conv.bias)
        if bias is None:
            return -constant.expand(-1, *size)
        maps = bias.T.unflatten(1, size)[None]
        with torch.autocast(maps.device.type, enabled=False):
            return self._conv(maps, self._weights()[1], None)[0] - constant

    def _scale_and_shift(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Scale and shift ``(C,)`` of the norm with its running statistics; None without a norm."""
        norm = self.norm
        if isinstance(norm, nn.Identity):
            return None, None
        return _affine(norm, norm.running_mean, norm.running_var)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, padding=self.padding)
        return F.conv2d(F.pad(x, [self.padding] * 4, mode=self.padding_mode), weight, bias)


def _per_class(values: Tensor) -> Tensor:
    return values[:, None, None]


def _as_bias(maps: Tensor) -> Tensor:
    """``(C, h, w)`` to ``(n, C)``."""
    return maps.flatten(1).T.contiguous()


def _affine(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift ``(C,)`` equivalent to a batch norm."""
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale


def _batch_norm_of_difference(norm: nn.BatchNorm2d, logits: Tensor, bias_map: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift ``(C,)`` of a batch norm in training on ``logits - bias_map``, without computing the difference.

    The images share the bias map, so it does not change the variance over the images at each position. By the law of
    total variance, the variance of the difference is the mean of these variances plus the variance over the positions
    of the images' mean: a sum of squares, without cancellation.

    Args:
        norm: updates its running statistics, as ``nn.BatchNorm2d`` does.
        logits: ``(B, C, h, w)``.
        bias_map: ``(C, h, w)``.
    """
    count = logits[:, 0].numel()
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {logits.size()}")
    mean_of_images = logits.mean(0)
    variance_of_images = (logits - mean_of_images).square().mean(0)
    variance_of_places, mean = torch.var_mean(mean_of_images - bias_map, (1, 2), correction=0)
    variance = variance_of_images.mean((1, 2)) + variance_of_places
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    return _affine(norm, mean, variance)
