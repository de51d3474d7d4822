"""Whether the weights of a CLIP are to be had, before hours depend on it: a hub's client tries for minutes."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from reclip_d2.clip.architectures import open_clip_name
from reclip_d2.clip.build import check_supported
from reclip_d2.clip.embedded import EMBEDDED_MODEL_NAME, embedded_checkpoint
from reclip_d2.errors import ReclipError

_SECONDS = 5  # to wait for a server


def find_weights(name: str, pretrained: str) -> Path | str:
    """The local file of CLIP's weights or, if it is not here but can be fetched, its address.

    Args:
        name: open_clip's name of the model, or that of the one that ships with the package.
        pretrained: a file or a tag.

    Raises:
        ReclipError: the model or the tag is unknown, the file does not exist, or the weights cannot be fetched.
    """
    if name == EMBEDDED_MODEL_NAME:
        return embedded_checkpoint(pretrained)
    own = open_clip_name(name)
    if own not in open_clip.list_models():
        raise ReclipError(f"--clip {name} is not known to open_clip: take ViT-B-16-quickgelu, or {EMBEDDED_MODEL_NAME}")
    check_supported(name)
    name = own
    file = Path(pretrained).expanduser()
    if file.is_file():
        return file
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise ReclipError(
            f"--pretrained {pretrained} is neither a file nor a tag of {name} (tags: {', '.join(tags) or 'none'})"
        )
    config = get_pretrained_cfg(name, pretrained)
    cached = _cached(config)
    if cached is not None:
        return cached
    address = _address(config)
    if not _is_reachable(address):
        raise ReclipError(
            f"the CLIP weights {pretrained!r} of {name} are not on this machine, and their server cannot be reached:"
            f" get {address} elsewhere, and name the file with --pretrained FILE"
        )
    return address


def _address(config: dict[str, Any]) -> str:
    """Where the weights of an open_clip tag lie."""
    if not config.get("hf_hub"):
        return config["url"]
    from huggingface_hub import hf_hub_url

    repository, _, file = config["hf_hub"].rpartition("/")
    return hf_hub_url(repository, file or "open_clip_model.safetensors")


def _cached(config: dict[str, Any]) -> Path | None:
    """File of an open_clip tag in the caches that open_clip reads, if it is there."""
    if not config.get("hf_hub"):
        file = Path("~/.cache/clip").expanduser() / Path(config["url"]).name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = config["hf_hub"].rpartition("/")
    for name in [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _is_reachable(address: str) -> bool:
    """Whether a server answers; nothing is fetched."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return reply.status < 400
    except (OSError, ValueError):
        return False
