"""Weights of an open_clip tag, from a cache or the network.

An unreachable server is detected within seconds; the hub's client would retry for minutes.
"""

from __future__ import annotations

import os
import re
import urllib.request
from pathlib import Path
from typing import Any

from open_clip.pretrained import download_pretrained, get_pretrained_cfg

from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import check_digest

_SECONDS = 5  # timeout of a server
_SHA256 = re.compile(r"[0-9a-f]{64}")


def address_of(config: dict[str, Any]) -> str:
    """URL of the weights of an open_clip tag."""
    if not config.get("hf_hub"):
        return config["url"]
    from huggingface_hub import hf_hub_url

    repository, _, file = config["hf_hub"].rpartition("/")
    return hf_hub_url(repository, file or "open_clip_model.safetensors")


def cached_file(config: dict[str, Any]) -> Path | None:
    """File of an open_clip tag in the caches that open_clip reads, or None."""
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


def is_reachable(address: str) -> bool:
    """Whether a server responds; nothing is downloaded."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return reply.status < 400
    except (OSError, ValueError):
        return False


def fetch_weights(name: str, tag: str) -> Path:
    """The weight file of an open_clip tag, from open_clip's cache or the network.

    Raises:
        ReclipError: the weights are neither cached nor can they be downloaded, or their hash is wrong.
    """
    config = get_pretrained_cfg(name, tag)
    if cached_file(config) is None and not is_reachable(address_of(config)):
        raise ReclipError(
            f"the weights {tag!r} of {name} are not on this machine, and their server cannot be reached: get"
            f" {_origin(config)} elsewhere, copy the file to this machine and set MODEL.CLIP.PRETRAINED to its path"
        )
    try:
        path = Path(download_pretrained(config))
    except Exception as error:  # no network: each client raises its own errors
        raise ReclipError(
            f"the weights {tag!r} of {name} cannot be fetched ({type(error).__name__}): get {_origin(config)} where"
            " there is a network, copy the file to this machine and set MODEL.CLIP.PRETRAINED to its path"
        ) from error
    # In the Hugging Face cache, file names are links to contents that are named by their SHA-256. For downloads from
    # elsewhere, open_clip checks the hash itself.
    if path.is_symlink() and _SHA256.fullmatch(path.resolve().name):
        check_digest(path.resolve(), path.resolve().name, f"the weights {tag!r} of {name}")
    return path


def _origin(config: dict[str, Any]) -> str:
    """Where a tag's weights come from, according to open_clip."""
    places = []
    if config.get("hf_hub"):
        repository, _, file = config["hf_hub"].rpartition("/")
        places.append(f"{file or 'open_clip_model.safetensors'} of the Hugging Face repository {repository}")
    if config.get("url"):
        places.append(str(config["url"]))
    return " or ".join(places) or "its file"
