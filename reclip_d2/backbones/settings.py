"""Settings that belong to CLIP weights but are not stored in them: pixel statistics and the activation.

They come from an open_clip tag, or from files next to a local weight file: ``open_clip_config.json`` (open_clip) or
``preprocessor_config.json`` and ``config.json`` (Hugging Face).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from reclip_d2.backbones.architectures import model_config, open_clip_name
from reclip_d2.backbones.timm_architecture import meta_tower
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, MissingFileError
from reclip_d2.utils.json_files import read_json

if TYPE_CHECKING:  # `reclip doctor` runs without it
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Rounding differences on the scale [0, 255].
_TOLERANCE = 0.05
_OBJECT = {"type": "object"}
_REMEDY = "replace it by the file of these weights, or remove it"


@dataclasses.dataclass(frozen=True)
class WeightSettings:
    """Settings of weights; those that their source does not give are None or empty.

    Attributes:
        origin: the source, for messages.
        mean, std: RGB, in [0, 255].
        quick_gelu: whether the weights need QuickGELU.
        architecture: open_clip's model config.
    """

    origin: str = ""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    quick_gelu: bool | None = None
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation for normalising images: RGB, in [0, 255].

    Attributes:
        from_weights: they come from the weights' settings, not from the config keys.
    """

    mean: list[float]
    std: list[float]
    from_weights: bool = False


def settings_of_weights(name: str, pretrained: str) -> WeightSettings:
    """Settings of weights, from an open_clip tag or from the JSON files next to a local file; without either, pixel
    statistics of a timm image tower from timm.

    Args:
        name: ``MODEL.CLIP.NAME``.
        pretrained: ``MODEL.CLIP.PRETRAINED``.

    Raises:
        ReclipError: a JSON file is damaged.
    """
    name = open_clip_name(name)
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        config = get_pretrained_cfg(name, pretrained)
        origin = f"the weights {pretrained!r} of {name}"
        mean, std = (_statistics(config.get(key), origin, key) for key in ("mean", "std"))
        return WeightSettings(origin, mean, std, bool(config.get("quick_gelu", False)))
    file = Path(pretrained).expanduser()
    settings = settings_beside(file) if file.is_file() else WeightSettings()
    config = model_config(name)
    if settings.mean is None and settings.std is None and "timm_model_name" in config["vision_cfg"]:
        own = meta_tower(config, name).trunk.pretrained_cfg
        origin = f"timm's {config['vision_cfg']['timm_model_name']}"
        mean, std = (_statistics(own.get(key), origin, key) for key in ("mean", "std"))
        settings = dataclasses.replace(settings, origin=settings.origin or origin, mean=mean, std=std)
    return settings


def settings_beside(file: Path) -> WeightSettings:
    """Settings in the JSON files next to a weight file; see :func:`settings_of_weights`."""
    path = file.parent / "open_clip_config.json"
    if (content := _read(path)) is not None:
        preprocessing, model = content.get("preprocess_cfg", {}), content.get("model_cfg", {})
        if not isinstance(preprocessing, dict) or not isinstance(model, dict):
            raise ReclipError(f"{path} is damaged: preprocess_cfg and model_cfg must be objects: {_REMEDY}")
        mean, std = (_statistics(preprocessing.get(key), str(path), key) for key in ("mean", "std"))
        quick_gelu = bool(model.get("quick_gelu", False)) if model else None
        return WeightSettings(str(path), mean, std, quick_gelu, model)
    path = file.parent / "preprocessor_config.json"
    if (content := _read(path)) is not None and content.get("do_normalize", True):
        mean, std = (_statistics(content.get(key), str(path), key) for key in ("image_mean", "image_std"))
        return WeightSettings(str(path), mean, std)
    return WeightSettings()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, _OBJECT, "weights' settings", _REMEDY, max_bytes=MIB)
    except MissingFileError:
        return None


def _statistics(value: Any, origin: str, key: str) -> tuple[float, float, float] | None:
    """Convert three numbers (or one for all) in [0, 1] to [0, 255]."""
    if value is None:
        return None
    numbers = [value] * 3 if isinstance(value, int | float) else value
    sound = isinstance(numbers, list | tuple) and len(numbers) == 3
    if not sound or not all(isinstance(n, int | float) and math.isfinite(n) and 0 <= n <= 1 for n in numbers):
        raise ReclipError(f"{origin} is damaged: {key} must be three numbers from 0 to 1: {_REMEDY}")
    if "std" in key and min(numbers) <= 0:
        raise ReclipError(f"{origin} is damaged: {key} must be above 0: {_REMEDY}")
    red, green, blue = (255 * float(n) for n in numbers)
    return red, green, blue


def default_pixel_statistics() -> PixelStatistics:
    """OpenAI's statistics: the defaults of ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``."""
    from reclip_d2.config.keys import KEYS  # imports detectron2

    return PixelStatistics(list(KEYS["MODEL.PIXEL_MEAN"].default), list(KEYS["MODEL.PIXEL_STD"].default))


def pixel_statistics(cfg: CfgNode) -> PixelStatistics:
    """Pixel statistics for ``MODEL.CLIP``.

    The weights' own statistics override the defaults of ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``, which are OpenAI's. If
    these keys have other values, they must agree with the weights, unless ``MODEL.CLIP.NORMALIZATION`` is ``keys``, or
    the keys for checkpoints of the public code are set, which normalises differently.

    Raises:
        ReclipError: keys and weights disagree.
    """
    from reclip_d2.config.keys import KEYS  # imports detectron2

    keys = cfg.MODEL
    clip = cfg.MODEL.CLIP
    given = PixelStatistics(list(keys.PIXEL_MEAN), list(keys.PIXEL_STD))
    public_code = clip.LAYER_NORM_EPS or clip.CLASS_TOKEN or clip.IMAGE_ACTIVATION != "own"
    if clip.NORMALIZATION == "keys" or public_code:
        return given
    settings = settings_of_weights(clip.NAME, clip.PRETRAINED)
    mean, std = given.mean, given.std
    taken = []
    for key, value in (("PIXEL_MEAN", settings.mean), ("PIXEL_STD", settings.std)):
        current = list(keys[key])
        if value is None or all(abs(a - b) <= _TOLERANCE for a, b in zip(value, current, strict=True)):
            continue
        own = [round(number, 4) for number in value]
        if current != list(KEYS[f"MODEL.{key}"].default):
            raise ReclipError(
                f"MODEL.{key} is {current}, but {settings.origin} says {own}: remove the key, or set"
                " MODEL.CLIP.NORMALIZATION keys"
            )
        taken.append(f"{key} {own}")
        mean, std = (own, std) if key == "PIXEL_MEAN" else (mean, own)
    if not taken:
        return given
    logger.info("Pixel statistics from %s: %s", settings.origin, ", ".join(taken))
    return PixelStatistics(mean, std, from_weights=True)
