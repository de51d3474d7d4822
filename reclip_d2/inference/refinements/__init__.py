"""Refinements of the mask logits at test time: one file each, chosen by ``TEST.REFINE``."""

from reclip_d2.inference.refinements.bank import BankRefinement
from reclip_d2.inference.refinements.base import (
    REFINEMENTS,
    Grid,
    Refinement,
    build_refinements,
    known_refinements,
    softmax_scale,
)
from reclip_d2.inference.refinements.denoise import Denoise
from reclip_d2.inference.refinements.lposs import LPOSS
from reclip_d2.inference.refinements.pamr import PAMR
from reclip_d2.inference.refinements.region_vote import RegionVote
from reclip_d2.inference.refinements.sfr import SFR

__all__ = [
    "LPOSS",
    "PAMR",
    "REFINEMENTS",
    "SFR",
    "BankRefinement",
    "Denoise",
    "Grid",
    "Refinement",
    "RegionVote",
    "build_refinements",
    "known_refinements",
    "softmax_scale",
]
