"""Check early and quickly that a CLIP's weights are available: a hub's client retries for minutes."""

from __future__ import annotations

from pathlib import Path

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from reclip_d2.backbones.architectures import open_clip_name
from reclip_d2.backbones.build import check_supported
from reclip_d2.backbones.download import address_of, cached_file, is_reachable
from reclip_d2.backbones.embedded import EMBEDDED_MODEL_NAME, embedded_checkpoint
from reclip_d2.errors import ReclipError


def find_weights(name: str, pretrained: str) -> Path | str:
    """The local file of CLIP's weights or, if it must be downloaded first, its address.

    Args:
        name: open_clip's name of the model, or the name of the bundled one.
        pretrained: a file or a tag.

    Raises:
        ReclipError: the model or the tag is unknown, the file does not exist, or the weights cannot be downloaded.
    """
    if name == EMBEDDED_MODEL_NAME:
        return embedded_checkpoint(pretrained)
    own = open_clip_name(name)
    if own not in open_clip.list_models():
        raise ReclipError(f"--clip {name} is not known to open_clip: use ViT-B-16-quickgelu, or {EMBEDDED_MODEL_NAME}")
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
    cached = cached_file(config)
    if cached is not None:
        return cached
    address = address_of(config)
    if not is_reachable(address):
        raise ReclipError(
            f"the CLIP weights {pretrained!r} of {name} are not on this machine, and their server cannot be reached:"
            f" download {address} elsewhere, and pass the file with --pretrained FILE"
        )
    return address
