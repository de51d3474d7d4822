"""Settings of the image tower that reproduce the public code of ReCLIP++.

That code changes CLIP's image tower: the LayerNorms of its blocks have another epsilon, the class token comes from a
separate file, and one revision uses GELU in place of QuickGELU. All of this is off by default.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.tensor_files import check_tensors, read_tensor_file

OWN_IMAGE_TOWER = "own"


def adapt_image_tower(
    visual: nn.Module, layer_norm_eps: float = 0.0, activation: str = "own", class_token: str = ""
) -> str:
    """Change an image tower in place; nobody else may use it.

    Args:
        visual: open_clip ``VisionTransformer``.
        layer_norm_eps: epsilon of ``ln_1`` and ``ln_2`` of all blocks; 0 keeps the model's. ``ln_pre`` and ``ln_post``
            do not change.
        activation: ``own``, or ``gelu``: GELU in the blocks' MLPs.
        class_token: file for :func:`read_class_token`; "" keeps CLIP's ``class_embedding``.

    Returns:
        a short name of the changes that the weights do not show; ``own`` if there are none.

    Raises:
        ReclipError: the tower is one of timm, which cannot be changed.
    """
    changes = []
    if hasattr(visual, "trunk"):
        if layer_norm_eps or activation != "own" or class_token:
            raise ReclipError(
                "MODEL.CLIP.LAYER_NORM_EPS, IMAGE_ACTIVATION and CLASS_TOKEN are for a ViT of open_clip: remove them"
            )
        return OWN_IMAGE_TOWER
    if class_token:
        token = read_class_token(class_token, len(visual.class_embedding))
        with torch.no_grad():
            visual.class_embedding.copy_(token)
    if layer_norm_eps:
        changes.append(f"eps {layer_norm_eps:g}")
        for block in visual.transformer.resblocks:
            block.ln_1.eps = block.ln_2.eps = layer_norm_eps
    if activation == "gelu":
        changes.append("gelu")
        for block in visual.transformer.resblocks:
            block.mlp.gelu = nn.GELU()
    return " ".join(changes) or OWN_IMAGE_TOWER


def read_class_token(path: str | Path, width: int) -> Tensor:
    """Class token ``(width,)`` float32 from a safetensors file: its tensor ``class_embedding``.

    Raises:
        ReclipError: the file is missing or damaged, or the token has another width.
    """
    content = read_tensor_file(path, "MODEL.CLIP.CLASS_TOKEN").content
    token = content.get("class_embedding") if isinstance(content, dict) else None
    if not isinstance(token, Tensor) or not token.is_floating_point():
        raise ReclipError(
            f"MODEL.CLIP.CLASS_TOKEN {path} cannot be used: it must be a safetensors file with a tensor class_embedding"
        )
    check_tensors(content, f"MODEL.CLIP.CLASS_TOKEN {path}")
    if token.numel() != width:
        raise ReclipError(
            f"MODEL.CLIP.CLASS_TOKEN {path} has {token.numel()} values; this CLIP's class token has {width}"
        )
    return token.flatten().float()
