"""Prompt templates of the Query text features (section III-A).

``imagenet_scene``, the default, has 85: the 80 that CLIP's authors chose for ImageNet (open_clip ships them)
and five that speak of a class as a part of a scene, as MaskCLIP and ReCLIP use them.
"""

from __future__ import annotations

import open_clip

from reclip_d2.errors import ReclipError

SCENE_TEMPLATES: tuple[str, ...] = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

# open_clip's are functions of the name; a template with a hole is easier to print, hash and compare.
IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "imagenet_scene": IMAGENET_TEMPLATES + SCENE_TEMPLATES,
    "imagenet": IMAGENET_TEMPLATES,
    "photo": ("a photo of a {}.",),
}


def get_templates(name: str) -> tuple[str, ...]:
    """Templates of ``MODEL.CLIP.TEMPLATES``; each holds one ``{}`` for the class name."""
    if name not in TEMPLATE_SETS:
        raise ReclipError(f"MODEL.CLIP.TEMPLATES is {name!r}; choose one of {', '.join(TEMPLATE_SETS)}")
    return TEMPLATE_SETS[name]
