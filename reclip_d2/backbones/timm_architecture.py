"""What is known of open_clip's models with a timm image tower before their weights are made: a tower on the meta device
has sizes, but no memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from torch import nn

from reclip_d2.errors import ReclipError


def meta_tower(config: dict[str, Any], name: str) -> nn.Module:
    """The image tower of a model config of open_clip with ``timm_model_name``, without weights.

    Args:
        name: ``MODEL.CLIP.NAME``, for messages.

    Raises:
        ReclipError: timm does not know the tower, or cannot build it.
    """
    vision = config["vision_cfg"]
    try:
        return _meta_tower(
            vision["timm_model_name"],
            config["embed_dim"],
            vision.get("timm_pool", "avg"),
            vision.get("timm_proj", "linear"),
            vision.get("timm_proj_bias", False),
            str(vision.get("image_size", 224)),
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise ReclipError(f"timm cannot build the image tower of MODEL.CLIP.NAME {name!r}: {cause}") from error


@functools.lru_cache(maxsize=32)
def _meta_tower(model: str, embed_dim: int, pool: str, proj: str, bias: bool, size: str) -> nn.Module:
    with torch.device("meta"):
        return TimmModel(model, embed_dim=embed_dim, pool=pool, proj=proj, proj_bias=bias).eval()
