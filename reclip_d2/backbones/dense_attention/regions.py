"""Attention inside regions (Zhang, Liu, Tang, "CorrCLIP: Reconstructing Patch Correlations in CLIP for Open-Vocabulary
Semantic Segmentation", ICCV 2025), with superpixels as regions.

Shape letters: B images, n patches, E width of the transformer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.backbones.build import embedding_shape
from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput, DenseAttention
from reclip_d2.backbones.dense_attention.helper import HELPER_KEYS, HelperModel, build_helper
from reclip_d2.backbones.dense_attention.rows import countable, mix
from reclip_d2.backbones.dense_attention.slic import patch_superpixels


@DENSE_ATTENTION_REGISTRY.register()
class RegionAttention(DenseAttention):
    """``A = softmax(scale S)`` over the patches of the same region, the same in all heads; without residual connections
    and MLP.

    Regions are SLIC superpixels of the image. (CorrCLIP: masks of SAM 2 or EoMT, merged by similarity; it also adds
    features of lower blocks and of the regions' class tokens, and lets the regions vote.) S is the cosine of a helper
    model's patches or, not in the paper, without a helper, of the last block's keys.
    """

    name = "regions"
    options = {
        "scale": "MODEL.CLIP.REGIONS_SCALE",
        "size": "MODEL.CLIP.REGIONS_SIZE",
        "compactness": "MODEL.CLIP.REGIONS_COMPACTNESS",
    }
    other_keys = HELPER_KEYS

    def __init__(
        self,
        patch_size: int,
        helper: HelperModel | None = None,
        scale: float = 4.0,
        size: int = 4,
        compactness: float = 1.0,
    ) -> None:
        """
        Args:
            patch_size: of the CLIP, in pixels.
            helper: the helper model; None for the keys of CLIP.
            scale: tau of the paper, which multiplies S.
            size: side of a superpixel, in patches.
            compactness: weight of place against colour.
        """
        super().__init__()
        self.patch_size = patch_size
        self.helper = helper
        self.scale = scale
        self.size = size
        self.compactness = compactness

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RegionAttention:
        keys = cfg.MODEL.CLIP
        patch = embedding_shape(keys.NAME)[1]
        helper = build_helper(cfg) if keys.HELPER_NAME else None
        return cls(patch, helper, keys.REGIONS_SCALE, keys.REGIONS_SIZE, keys.REGIONS_COMPACTNESS)

    def forward(self, inputs: AttentionInput) -> Tensor:
        """Output patches ``(B, n, E)``."""
        block, valid = inputs.block, countable(inputs.valid)
        normed = block.norm(inputs.patches)
        regions = patch_superpixels(inputs.images, self.patch_size, self.size, self.compactness, inputs.valid)
        if self.helper is None:
            unit = F.normalize(block.keys(normed), dim=-1)
        else:
            unit = self.helper(inputs.images, inputs.grid, inputs.valid)

        def weigh(scores: Tensor, rows: slice) -> Tensor:
            same = regions[:, rows, None] == regions[:, None, :]
            if valid is not None:
                # Patches of padding have regions of their own choice, which must not be empty.
                same = same & (valid[:, None, :] | ~valid[:, rows, None])
            return (self.scale * scores).masked_fill(~same, float("-inf")).softmax(dim=-1)

        return block.output(mix(unit, unit, block.values(normed), weigh))

    def identity(self) -> dict[str, Any]:
        """Name and options, and the helper's name and hash if there is one."""
        return super().identity() | ({} if self.helper is None else self.helper.identity())
