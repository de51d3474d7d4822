"""Families of open_clip's models, from their configs: which work, and what they need. Nothing is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import open_clip
import timm
import timm.models

from reclip_d2.backbones import EMBEDDED_MODEL_NAME

# Modules of timm with Vision Transformers whose blocks are the usual ones.
_TIMM_VITS = ("eva", "vision_transformer", "vision_transformer_hybrid", "vitamin")
_NAMES = ("SigLIP2", "SigLIP", "EVA01", "EVA02", "PE-Core", "ViTamin", "MobileCLIP", "CLIPA", "worldwide")


@dataclasses.dataclass
class Family:
    """Models with the same kind of towers.

    Attributes:
        name: such as "SigLIP2"; for a text tower of transformers, its kinds.
        tower: image tower: "open_clip ViT", "timm ViT", "ResNet" or timm's module.
        works: whether dense features can be computed.
        pooled: whether the tower pools by attention: ``value`` is then the value path of the pooling.
        needs_transformers: whether tokenizer or text tower are Hugging Face's.
        models: open_clip's names.
        weights: number of pretrained weights.
        example: a model and tag of them; "" without weights.
    """

    name: str
    tower: str
    works: bool
    pooled: bool
    needs_transformers: bool
    models: list[str] = dataclasses.field(default_factory=list)
    weights: int = 0
    example: str = ""


def families() -> list[Family]:
    """All families of the installed open_clip, those that work first."""
    found: dict[tuple, Family] = {}
    for name in sorted(set(open_clip.list_models()) - {EMBEDDED_MODEL_NAME}):
        config = open_clip.get_model_config(name)
        family = _family_of(name, config)
        family = found.setdefault(dataclasses.astuple(family)[:5], family)
        family.models.append(name)
        tags = open_clip.list_pretrained_tags_by_model(name)
        family.weights += len(tags)
        if tags and not family.example:
            family.example = f"{name} {tags[0]}"
    return sorted(found.values(), key=lambda family: (not family.works, family.tower, family.name))


def _family_of(name: str, config: Mapping[str, Any]) -> Family:
    vision, text = config["vision_cfg"], config["text_cfg"]
    tower = "open_clip ViT"
    if "timm_model_name" in vision and timm.is_model(vision["timm_model_name"]):
        module = timm.models.model_entrypoint(vision["timm_model_name"]).__module__.rpartition(".")[2]
        tower = "timm ViT" if module in _TIMM_VITS else f"timm {module}"
    elif isinstance(vision.get("layers"), list | tuple):
        tower = "ResNet"
    hugging_face = "hf_tokenizer_name" in text or "hf_model_name" in text
    title = next((known for known in _NAMES if known in name), "")
    if "multimodal_cfg" in config:
        title = "CoCa"
    elif "hf_model_name" in text:
        title = "XLM-R, mT5, NLLB"
    elif not title:
        title = {"open_clip ViT": "CLIP", "timm ViT": "CLIP", "ResNet": "CLIP"}.get(tower, tower.removeprefix("timm "))
    pooled = bool(vision.get("attentional_pool")) or vision.get("timm_pool") == "map"
    return Family(title, tower, tower.endswith("ViT"), pooled, hugging_face)
