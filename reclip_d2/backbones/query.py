"""Query text features W_q (section III-A): prompt templates, the frozen segmentation head computed from them, and its
cache.

``imagenet_scene``, the default set, has 85 templates: the 80 that CLIP's authors chose for ImageNet (from open_clip),
and five that describe a class as part of a scene, as in MaskCLIP and ReCLIP.

Shape letters: C classes, D width of the joint embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from reclip_d2.backbones.architectures import open_clip_name
from reclip_d2.data.class_file import ClassList, check_name_tokens
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, read_bytes
from reclip_d2.utils.io import atomic_write, cache_dir, remove_leftovers_of
from reclip_d2.utils.locks import lock_path, waiting

logger = logging.getLogger(__name__)

_MAX_CACHE_BYTES = 1024 * MIB

SCENE_TEMPLATES: tuple[str, ...] = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

# open_clip's templates are functions of the name; strings with a placeholder are easier to print, hash and compare.
IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "imagenet_scene": IMAGENET_TEMPLATES + SCENE_TEMPLATES,
    "imagenet": IMAGENET_TEMPLATES,
    "photo": ("a photo of a {}.",),
}


def get_templates(name: str) -> tuple[str, ...]:
    """Templates of ``MODEL.CLIP.TEMPLATES``; each has one ``{}`` for the class name."""
    if name not in TEMPLATE_SETS:
        raise ReclipError(f"MODEL.CLIP.TEMPLATES is {name!r}; choose one of {', '.join(TEMPLATE_SETS)}")
    return TEMPLATE_SETS[name]


class TextTower(Protocol):
    """What :func:`query_features` needs of a backbone or its text encoder."""

    @property
    def embed_dim(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def name_tokens(self, name: str) -> list[int]: ...

    def text_features(self, texts: Sequence[str]) -> Tensor: ...


# Classes encoded in one turn: enough to sort texts by length, few enough to take turns often.
_CLASSES_AT_ONCE = 16


@torch.no_grad()
def query_features(
    text_tower: TextTower,
    class_names: Sequence[Sequence[str]],
    templates: Sequence[str],
    turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Tensor:
    """Query text features W_q (section III-A): the frozen segmentation head.

    Each text feature is normalised, the features of a class (all templates of all its names) are averaged, and the
    average is normalised again.

    Args:
        class_names: for each class its name and any synonyms.
        templates: texts with one ``{}`` for the name.
        turn: makes a context that is entered for the encoding of each group of classes.

    Returns:
        ``(C, D)`` float32 on the CPU.

    Raises:
        ReclipError: a class name is too long for the text tower.
    """
    texts = [[template.format(name) for name in names for template in templates] for names in class_names]
    for names, own_texts in zip(class_names, texts, strict=True):
        longest = max(len(text_tower.name_tokens(text)) for text in own_texts)
        if longest > text_tower.context_length - 2:
            raise ReclipError(f"class name {names[0][:60]!r} is longer than the text encoder takes: shorten it")
    features = []
    for start in range(0, len(texts), _CLASSES_AT_ONCE):
        group = texts[start : start + _CLASSES_AT_ONCE]
        with turn():
            embeddings = text_tower.text_features([text for own_texts in group for text in own_texts])
        of_classes = embeddings.split([len(own_texts) for own_texts in group])
        features.extend(F.normalize(rows.mean(dim=0), dim=0) for rows in of_classes)
    return torch.stack(features).cpu()


def cached_query_features(
    text_tower: TextTower,
    class_names: Sequence[Sequence[str]],
    templates: Sequence[str],
    clip_key: str,
    turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Tensor:
    """:func:`query_features`, cached in a file below :func:`reclip_d2.utils.io.cache_dir`.

    The file is named by a hash of all that the features depend on: ``clip_key`` (``VisionLanguageBackbone.key``:
    architecture and weights), the templates and the names.
    """
    key = json.dumps([clip_key, list(templates), [list(names) for names in class_names]])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_dir() / "query_features" / f"{digest}.safetensors"
    shape = (len(class_names), text_tower.embed_dim)
    if (cached := _read_query_features(path, shape)) is not None:
        return cached
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(waiting(lock_path(path), "another run, which computes the same text features"))
            if (cached := _read_query_features(path, shape)) is not None:
                return cached
        except OSError as error:
            logger.warning("the cache cannot be written: %s", error)
            return query_features(text_tower, class_names, templates, turn)
        features = query_features(text_tower, class_names, templates, turn)
        try:
            remove_leftovers_of(path)
            with atomic_write(path) as temporary:
                temporary.write_bytes(safetensors.torch.save({"query_features": features}))
        except OSError as error:  # such as a full disk
            logger.warning("text features are not cached: %s", error)
    return features


def _read_query_features(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Features from a cache file; None if it is missing or damaged, which is not the user's mistake."""
    try:
        features = safetensors.torch.load(read_bytes(path, limit=_MAX_CACHE_BYTES)).get("query_features")
    except (ReclipError, safetensors.SafetensorError, ValueError):
        return None
    if features is None or features.dtype != torch.float32 or tuple(features.shape) != shape:
        return None
    return features if torch.allclose(features.norm(dim=1), torch.ones(shape[0]), atol=1e-3) else None


def check_class_names(
    class_names: Sequence[Sequence[str]], encode: Callable[[str], Sequence[int]] | None = None
) -> None:
    """Raise :class:`ReclipError` for an empty list, an empty name or a name that two classes share.

    Args:
        encode: maps a name to token ids: names with equal tokens then count as the same.
    """
    if not class_names:
        raise ReclipError("the class list is empty: the data set's metadata needs stuff_classes")
    seen: dict[str, int] = {}
    read: dict[tuple[int, ...], tuple[int, str]] = {}
    for index, names in enumerate(class_names):
        if not names:
            raise ReclipError(f"class {index} has no name: give every class a name")
        for name in names:
            if not name.strip():
                raise ReclipError(f"class {index} has an empty name: give every class a name")
            if seen.setdefault(name.strip().lower(), index) != index:
                raise ReclipError(
                    f"classes {seen[name.strip().lower()]} and {index} share the name {name!r}: rename one"
                )
            if encode is not None:
                other_index, other = read.setdefault(tuple(encode(name)), (index, name))
                if other_index != index:
                    raise ReclipError(
                        f"CLIP reads the names {other!r} of class {other_index} and {name!r} of class {index} alike:"
                        " rename one"
                    )


def check_names_fit(classes: ClassList, clip_name: str, templates: str) -> None:
    """Raise :class:`ReclipError`, naming the line, for a class name that CLIP's text encoder cannot encode.

    Needs no weights: tokenizer and context length follow from the model's name.

    Args:
        clip_name: ``MODEL.CLIP.NAME``. For a model that open_clip does not know, or with another tokenizer than CLIP's,
            lengths are checked when the model is built.
        templates: name of the template set.
    """
    clip_name = open_clip_name(clip_name)
    config = open_clip.get_model_config(clip_name)
    if config is None or "hf_tokenizer_name" in config["text_cfg"]:
        check_name_tokens(classes, SimpleTokenizer().encode)
        return
    encode = SimpleTokenizer().encode
    longest = max(len(encode(template.format(""))) for template in get_templates(templates))
    room = config["text_cfg"].get("context_length", 77) - 2  # start and end
    check_name_tokens(classes, encode, room - longest)
