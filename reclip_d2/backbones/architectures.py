"""Resolve ``MODEL.CLIP.NAME``: a model of open_clip, or a JSON file with an architecture in open_clip's format."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import open_clip

from reclip_d2.backbones.embedded import register_embedded_config
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB
from reclip_d2.utils.io import atomic_write, cache_dir
from reclip_d2.utils.json_files import read_json

# Side in pixels of the images that most CLIPs are trained on.
USUAL_SIDE = 224
_REMEDY = "use a model config of open_clip: embed_dim, vision_cfg and text_cfg"


def _size(maximum: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": maximum}


# Bounds far above any CLIP, so that a typo cannot exhaust the memory.
_TOWER = {"width": _size(32_768), "mlp_ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 64}}
_ARCHITECTURE = {
    "type": "object",
    "required": ["embed_dim", "vision_cfg", "text_cfg"],
    "properties": {
        "embed_dim": _size(32_768),
        "quick_gelu": {"type": "boolean"},
        "vision_cfg": {
            "type": "object",
            "properties": {
                **_TOWER,
                "layers": {"anyOf": [_size(1_000), {"type": "array"}]},
                "head_width": _size(4_096),
                "patch_size": _size(512),
                "image_size": {
                    "anyOf": [_size(8_192), {"type": "array", "items": _size(8_192), "minItems": 2, "maxItems": 2}]
                },
            },
        },
        "text_cfg": {
            "type": "object",
            "properties": {
                **_TOWER,
                "layers": _size(1_000),
                "heads": _size(1_024),
                "context_length": _size(65_536),
                "vocab_size": _size(4_000_000),
            },
        },
    },
}
_FILE = {
    "type": "object",
    "anyOf": [_ARCHITECTURE, {"required": ["model_cfg"], "properties": {"model_cfg": _ARCHITECTURE}}],
}


def open_clip_name(name: str) -> str:
    """The name of ``MODEL.CLIP.NAME`` in open_clip.

    The architecture of a JSON file (a model config, or the ``open_clip_config.json`` of a Hugging Face repository) is
    registered under the file's name and a hash of the architecture, so that checkpoints distinguish architectures.

    Raises:
        ReclipError: the file does not exist, or is not a model config.
    """
    register_embedded_config()
    if not is_architecture_file(name):
        return name
    content = read_json(Path(name).expanduser(), _FILE, "MODEL.CLIP.NAME", _REMEDY, max_bytes=MIB)
    config = content.get("model_cfg", content)
    if _side(config) < config["vision_cfg"].get("patch_size", 1):
        raise ReclipError(f"MODEL.CLIP.NAME {name}: vision_cfg has a patch_size above its image_size: {_REMEDY}")
    text = json.dumps(config, sort_keys=True)
    stem = re.sub(r"[^\w.-]", "_", Path(name).stem)[:60]
    own = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if own not in open_clip.list_models():
        path = cache_dir() / "architectures" / f"{own}.json"
        with atomic_write(path) as temporary:  # open_clip wants a file, and names the model after it
            temporary.write_text(text, encoding="utf-8")
        open_clip.add_model_config(path)
    return own


def is_architecture_file(name: str) -> bool:
    """Whether ``MODEL.CLIP.NAME`` names a JSON file."""
    return name.endswith(".json")


def model_config(name: str) -> dict[str, Any]:
    """open_clip's config of ``MODEL.CLIP.NAME``.

    Raises:
        ReclipError: open_clip does not know the name, or cannot fetch its config.
    """
    known = open_clip_name(name)
    try:
        config = open_clip.get_model_config(known)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # for names such as hf-hub:OWNER/MODEL
        raise ReclipError(
            f"MODEL.CLIP.NAME {name!r}: its config cannot be fetched ({type(error).__name__}): check the name and the"
            " network, or give the JSON file of an architecture"
        ) from error
    if config is None:
        raise ReclipError(
            f"MODEL.CLIP.NAME {name!r} is not known to open_clip: see open_clip.list_models(), or give the JSON file of"
            " an architecture"
        )
    return config


def image_side(name: str) -> int:
    """Side in pixels of the images that a CLIP was trained on: the shorter one, if they were not square."""
    return _side(model_config(name))


def _side(config: dict[str, Any]) -> int:
    size = config["vision_cfg"].get("image_size", USUAL_SIDE)
    return min(size) if isinstance(size, list | tuple) else size


def suits_resolution(short_side: int, clip_side: int) -> bool:
    """Whether a CLIP's features are useful for images of this short side: half to four times the size that the CLIP was
    trained at. The papers use 2.3 times."""
    return clip_side <= 2 * short_side and short_side <= 4 * clip_side
