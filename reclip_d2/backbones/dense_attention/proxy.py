"""Proxy attention (Lan et al., "ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation", ECCV 2024):
a helper vision model says which patches belong together. Written from the paper's formulas.

Shape letters: B images, (h, w) CLIP's grid, u upsampling, n' = u*h * u*w patches, E width of the transformer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.backbones.build import embedding_shape
from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput, DenseAttention
from reclip_d2.backbones.dense_attention.helper import HELPER_KEYS, HelperModel, build_helper
from reclip_d2.backbones.dense_attention.rows import countable, mean_similarity, mix, softmax_of_positive


@DENSE_ATTENTION_REGISTRY.register()
class ProxyAttention(DenseAttention):
    """``A = softmax(scale (S - shift mean S))`` over the patches with a positive score, with ``S = cos(f, f)`` of the
    helper's patches f; the same in all heads. Without residual connections and MLP.

    The helper's grid is a multiple of CLIP's, to which the image is resized; CLIP's values are resized to it.
    """

    name = "proxy"
    options = {"shift": "MODEL.CLIP.PROXY_SHIFT", "scale": "MODEL.CLIP.PROXY_SCALE"}
    other_keys = (*HELPER_KEYS, "MODEL.CLIP.PROXY_UPSAMPLING")

    def __init__(self, helper: HelperModel, shift: float = 1.2, scale: float = 3.0, upsampling: int = 1) -> None:
        """
        Args:
            helper: the helper model.
            shift: beta of the paper.
            scale: gamma of the paper.
            upsampling: u.
        """
        super().__init__()
        self.helper = helper
        self.shift = shift
        self.scale = scale
        self.upsampling = upsampling

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ProxyAttention:
        keys, helper = cfg.MODEL.CLIP, build_helper(cfg)
        patch = embedding_shape(keys.NAME)[1]
        upsampling = keys.PROXY_UPSAMPLING or max(1, patch // helper.patch_size)
        return cls(helper, keys.PROXY_SHIFT, keys.PROXY_SCALE, upsampling)

    def forward(self, inputs: AttentionInput) -> Tensor:
        """Output patches ``(B, n', E)``."""
        block, factor = inputs.block, self.upsampling
        grid = (inputs.grid[0] * factor, inputs.grid[1] * factor)
        valid = inputs.valid
        if valid is not None and factor > 1:
            maps = valid.unflatten(1, inputs.grid)
            valid = maps.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2).flatten(1)
        unit = self.helper(inputs.images, grid, valid)
        values = upsample_values(block.values(block.norm(inputs.patches)), inputs.valid, inputs.grid, factor)
        counted = countable(valid)
        threshold = self.shift * mean_similarity(unit, counted)
        mixed = mix(
            unit, unit, values, lambda scores, rows: softmax_of_positive(self.scale * (scores - threshold), counted)
        )
        return block.output(mixed)

    def identity(self) -> dict[str, Any]:
        """Name and options, and the helper's name, hash and grid."""
        return super().identity() | self.helper.identity() | {"MODEL.CLIP.PROXY_UPSAMPLING": self.upsampling}


def upsample_values(values: Tensor, valid: Tensor | None, grid: tuple[int, int], factor: int) -> Tensor:
    """Values ``(B, n, E)`` on a grid ``factor`` times as fine, bilinearly: ``(B, n', E)``. Padding has no say:
    means are over valid patches."""
    if factor == 1:
        return values

    def finer(x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, grid)
        size = (grid[0] * factor, grid[1] * factor)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)

    if valid is None:
        return finer(values)
    weights = valid[..., None].to(values.dtype)
    return finer(weights * values) / finer(weights).clamp(min=1e-6)
