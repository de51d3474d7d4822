"""Build a frozen CLIP through open_clip."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import open_clip
import torch
from torch import nn

from reclip_d2.clip.embedded import EMBEDDED_MODEL_NAME, build_embedded_clip
from reclip_d2.errors import ReclipError


def build_clip(name: str, pretrained: str) -> tuple[nn.Module, object]:
    """Build an open_clip model with frozen weights, in eval mode, float32, on the CPU.

    Args:
        name: an open_clip model name, or ``reclip-embedded`` for the tiny CLIP that ships with the package.
        pretrained: an open_clip tag (``openai``, ``laion2b_s34b_b88k``, ...), a local checkpoint file, or
            ``random`` for seeded random weights (tests). Ignored for ``reclip-embedded``.

    Returns:
        the model and its tokenizer.
    """
    if name == EMBEDDED_MODEL_NAME:
        model = build_embedded_clip()
    elif name not in open_clip.list_models():
        raise ReclipError(f"MODEL.CLIP.NAME {name!r} is not known to open_clip: see open_clip.list_models()")
    elif pretrained == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained=None)
    else:
        model = _build_pretrained(name, pretrained)
    return model.float().eval().requires_grad_(False), open_clip.get_tokenizer(name)


def _build_pretrained(name: str, pretrained: str) -> nn.Module:
    """A model with the weights of a tag or of a local file. Only tensors are loaded, never code."""
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(name)
    if not is_tag and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ReclipError(f"MODEL.CLIP.PRETRAINED {pretrained!r} is neither a file nor a tag of {name} (tags: {tags})")
    if is_tag and pretrained == "openai" and "quickgelu" not in name and f"{name}-quickgelu" in open_clip.list_models():
        raise ReclipError(f"OpenAI's weights need QuickGELU: set MODEL.CLIP.NAME to {name}-quickgelu instead of {name}")
    try:
        return open_clip.create_model(name, pretrained=pretrained, weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, LookupError, ValueError, AttributeError) as error:
        if is_tag:
            raise ReclipError(
                f"the weights {pretrained!r} of {name} cannot be fetched or read ({type(error).__name__}): without a"
                " network, put the file on this machine and name it in MODEL.CLIP.PRETRAINED"
            ) from error
        raise ReclipError(
            f"MODEL.CLIP.PRETRAINED {pretrained} cannot be loaded as tensors of {name}: it is damaged, holds code, or"
            " belongs to another model"
        ) from error


def clip_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights (float32 state tensors in the order of their sorted names), as hex digits."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        digest.update(state[key].detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
