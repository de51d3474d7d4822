"""Precision of the frozen image tower."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

AUTOCAST_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tower_precision(cfg: CfgNode) -> str:
    """``MODEL.CLIP.AUTOCAST`` with ``auto`` resolved: ``bfloat16`` for a frozen tower on a GPU that has it, otherwise
    ``float32``.

    Features depend on it: feature stores, hypothesis files and the settings of a training record the result.
    """
    chosen = cfg.MODEL.CLIP.AUTOCAST
    if chosen != "auto":
        return chosen
    return "bfloat16" if _on_bfloat16_gpu(cfg.MODEL.DEVICE) and not cfg.MODEL.CLIP.FINE_TUNE else "float32"


def _on_bfloat16_gpu(device: str) -> bool:
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
