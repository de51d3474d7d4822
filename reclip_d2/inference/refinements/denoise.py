"""Prompt denoising: drop classes that no patch of the image is confident of (MaskCLIP; public code of ReCLIP++)."""

from __future__ import annotations

from detectron2.config import CfgNode

from reclip_d2.inference.refinements.base import REFINEMENTS, Grid
from reclip_d2.modeling.meta_arch.maskclip import absent_classes

DROPPED = -100.0
"""Logit of a dropped class, as in the public code."""


@REFINEMENTS.register()
class Denoise:
    """``M_c <- -100`` where ``max_n softmax_c(s M)_nc < t``, in the image; the best class is never dropped.

    The public code drops all classes if none is confident; then every pixel gets the first class.
    """

    name = "denoise"
    needs_features = False
    needs_pixels = False

    def __init__(self, cfg: CfgNode) -> None:
        self.threshold = cfg.TEST.DENOISE.THRESHOLD

    def __call__(self, grid: Grid) -> Grid:
        rows, columns = grid.valid
        absent = absent_classes(grid.logits[None, :, :rows, :columns].softmax(1), self.threshold)[0]
        return grid.with_logits(grid.logits.masked_fill(absent[:, None, None], DROPPED))
