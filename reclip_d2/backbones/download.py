"""Whether the weights of an open_clip tag are to be had, found out in seconds: a hub's client tries for minutes."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import Any

_SECONDS = 5  # to wait for a server


def address_of(config: dict[str, Any]) -> str:
    """Where the weights of an open_clip tag lie."""
    if not config.get("hf_hub"):
        return config["url"]
    from huggingface_hub import hf_hub_url

    repository, _, file = config["hf_hub"].rpartition("/")
    return hf_hub_url(repository, file or "open_clip_model.safetensors")


def cached_file(config: dict[str, Any]) -> Path | None:
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


def is_reachable(address: str) -> bool:
    """Whether a server answers; nothing is fetched."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return reply.status < 400
    except (OSError, ValueError):
        return False
