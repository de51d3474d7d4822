"""Mask decoder F_dec, Eq. (4).

Shape letters: B images, (h, w) patch grid, C classes, D width of the joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from reclip_d2.modeling.norm import build_norm

INITS = ("default", "identity")


class MaskDecoder(nn.Module):
    """Eq. (4): ``M_o = F_dec(M, Z)``, a convolution of ``concat(Z, M)`` and a batch norm.

    A convolution is linear, so ``conv(concat(Z, M)) = conv_Z(Z) + conv_M(M)``: the two parts are computed apart.
    A frozen Z needs no gradient, and none is computed.
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
            norm: a name that Detectron2's ``get_norm`` knows: BN, SyncBN, FrozenBN, GN (C a multiple of 32) or "".
            padding_mode: ``replicate`` or ``zeros``. Zeros lower the logits at the border, a space bias of the
                decoder's own.
            init: ``default`` (PyTorch's), or ``identity``: before training the convolution passes M through
                and ignores Z.
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
        """Mask logits M_o ``(B, C, h, w)`` of rectified logits M ``(B, C, h, w)`` and features Z ``(B, D, h, w)``."""
        weight_z, weight_m = self.conv.weight.split([self.embed_dim, logits.shape[1]], dim=1)
        out = self._conv(features, weight_z, self.conv.bias) + self._conv(logits, weight_m, None)
        # Statistics and M_o in float32 under autocast too.
        return self.norm(out.to(torch.promote_types(out.dtype, torch.float32)))

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, padding=self.padding)
        return F.conv2d(F.pad(x, [self.padding] * 4, mode=self.padding_mode), weight, bias)
