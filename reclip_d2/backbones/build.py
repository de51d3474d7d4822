"""Build a frozen CLIP through open_clip."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

from reclip_d2.backbones.architectures import model_config, open_clip_name
from reclip_d2.backbones.download import fetch_weights
from reclip_d2.backbones.embedded import EMBEDDED_MODEL_NAME, build_embedded_clip, embedded_checkpoint
from reclip_d2.backbones.settings import WeightSettings, settings_beside
from reclip_d2.backbones.text_files import load_tokenizer, with_local_text_config
from reclip_d2.backbones.timm_architecture import meta_tower
from reclip_d2.backbones.weights import ClipWeights, load_clip_weights, read_clip_weights
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)

# What open_clip, timm and transformers raise for an architecture that cannot be built.
_BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def build_clip(name: str, pretrained: str, text_files: str = "") -> tuple[nn.Module, object]:
    """Build an open_clip model with frozen weights, in eval mode, float32, on the CPU.

    Args:
        name: an open_clip model name, the JSON file of an architecture, or ``reclip-embedded`` for the tiny CLIP that
            ships with the package.
        pretrained: an open_clip tag (``openai``, ``laion2b_s34b_b88k``, ...); a local file: OpenAI's TorchScript
            archive, or a state dict with open_clip's or Hugging Face's names; or ``random`` for seeded random weights
            (tests). For ``reclip-embedded``: ``embedded`` (or ``openai``), the weights that ship, or a file written by
            tools/pretrain_embedded_clip.py.
        text_files: ``MODEL.CLIP.TEXT_FILES``, a folder with the files of a tokenizer or text tower of Hugging Face.

    Returns:
        the model and its tokenizer.

    Raises:
        ReclipError: a name or tag is unknown, the kind of model is not supported, or the weights are not available or
            do not fit.
    """
    if name == EMBEDDED_MODEL_NAME:
        model = build_embedded_clip(embedded_checkpoint(pretrained))
        return model.float().eval().requires_grad_(False), open_clip.get_tokenizer(name)
    check_supported(name)
    own = open_clip_name(name)
    tokenizer = load_tokenizer(own, model_config(name), pretrained, text_files)
    model = _build(own, pretrained, with_local_text_config(own, model_config(name), pretrained, text_files))
    return model.float().eval().requires_grad_(False), tokenizer


def check_supported(name: str) -> None:
    """Raise :class:`ReclipError` for an open_clip model without a Vision Transformer as image tower.

    Reads the model's config, before the (possibly large) model is built;
    :func:`~reclip_d2.backbones.vision.check_image_tower` checks the module itself.
    """
    config = model_config(name)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        from reclip_d2.backbones.vision import (
            check_image_tower,  # imports Detectron2, which reclip doctor does not need
        )

        check_image_tower(meta_tower(config, name), name)
    elif isinstance(vision.get("layers"), list | tuple):
        raise ReclipError(
            f"MODEL.CLIP.NAME {name!r} is not supported: its image tower is a ResNet; use a ViT such as"
            " ViT-B-16-quickgelu"
        )


def embedding_shape(name: str) -> tuple[int, int]:
    """Width D of the joint embedding and side of a patch in pixels, from the model's config: no weights are made."""
    config = model_config(name)
    check_supported(name)
    if "timm_model_name" in config["vision_cfg"]:
        from reclip_d2.backbones.timm_tower import TimmTower

        return config["embed_dim"], TimmTower(meta_tower(config, name)).patch_size
    return config["embed_dim"], config["vision_cfg"]["patch_size"]


def _build(name: str, pretrained: str, text: dict[str, Any]) -> nn.Module:
    """A model with the weights of a tag or a local file, or random weights.

    Args:
        text: result of :func:`~reclip_d2.backbones.text_files.with_local_text_config`.
    """
    if pretrained == "random":
        return _random_model(name, text)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        quick_gelu = bool(get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
        _check_activation(name, f"the weights {pretrained!r}", quick_gelu)
        weights = read_clip_weights(fetch_weights(name, pretrained))
    else:
        path = Path(pretrained).expanduser()
        if not path.is_file():
            raise ReclipError(
                f"MODEL.CLIP.PRETRAINED {pretrained!r} is neither a file nor a tag of {name}"
                f" (tags: {', '.join(tags) or 'none'})"
            )
        weights = read_clip_weights(path)
        settings = settings_beside(path)
        _check_architecture(name, settings)
        _check_file_activation(name, pretrained, weights, settings)
    model = _random_model(name, text)
    load_clip_weights(model, weights, name, pretrained)
    return model


def _random_model(name: str, text: dict[str, Any]) -> nn.Module:
    """The model with open_clip's initialisation from a fixed seed; torch's global generator is not advanced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return open_clip.create_model(name, pretrained=None, pretrained_text=False, **text)
        except (
            TypeError,
            ValueError,
            AssertionError,
            AttributeError,
            KeyError,
            OSError,
            RuntimeError,
            ZeroDivisionError,
        ) as error:
            cause = " ".join(str(error).split())[:120] or type(error).__name__
            raise ReclipError(f"open_clip cannot build MODEL.CLIP.NAME {name!r}: {cause}") from error


def _check_architecture(name: str, settings: WeightSettings) -> None:
    """Raise :class:`ReclipError` if a config next to the weights has another architecture than the model."""
    from reclip_d2.config import flatten  # imports Detectron2, which reclip doctor does not need

    theirs, ours = flatten(settings.architecture), flatten(model_config(name))
    for key in sorted(theirs.keys() & ours.keys() - {"quick_gelu"}):  # the activation has a separate message
        if theirs[key] != ours[key]:
            raise ReclipError(
                f"{settings.origin} says {key} {theirs[key]}, but MODEL.CLIP.NAME {name} has {ours[key]}: set"
                " MODEL.CLIP.NAME to the model of these weights"
            )


def _check_file_activation(name: str, source: str, weights: ClipWeights, settings: WeightSettings) -> None:
    if weights.quick_gelu is not None:
        _check_activation(name, f"MODEL.CLIP.PRETRAINED {source} ({weights.source} weights)", weights.quick_gelu)
    elif settings.quick_gelu is not None:
        _check_activation(name, f"MODEL.CLIP.PRETRAINED {source} (as {settings.origin} says)", settings.quick_gelu)
    elif weights.source == "Hugging Face":
        logger.warning(
            "no config.json next to %s: cannot tell whether it needs QuickGELU (OpenAI's weights do)", source
        )


def _check_activation(name: str, what: str, quick_gelu: bool) -> None:
    """Raise :class:`ReclipError` unless the model has the activation that the weights were trained with."""
    has_quick_gelu = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    if has_quick_gelu == quick_gelu:
        return
    other = name.removesuffix("-quickgelu") if has_quick_gelu else f"{name}-quickgelu"
    remedy = f"set MODEL.CLIP.NAME to {other} instead of {name}"
    if other not in open_clip.list_models():
        remedy = f"{name} is the wrong model for them"
    need = "need QuickGELU" if quick_gelu else "were trained with GELU, not QuickGELU"
    raise ReclipError(f"{what} {need}: {remedy}")


def clip_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights (float32 state tensors, sorted by name), as hex digits."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        digest.update(state[key].detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
