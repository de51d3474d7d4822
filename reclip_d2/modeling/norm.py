"""Norm layers by Detectron2's names."""

from __future__ import annotations

from detectron2.layers import get_norm
from torch import nn

from reclip_d2.errors import ReclipError


def build_norm(name: str, channels: int, key: str) -> nn.Module:
    """A norm layer over ``channels``.

    Args:
        name: one that Detectron2's ``get_norm`` knows: BN, SyncBN, FrozenBN, GN (channels a multiple of 32), or "" for
            none.
        key: config key that holds the name, for the message.

    Raises:
        ReclipError: no such norm, or it does not work for so many channels.
    """
    try:
        return get_norm(name, channels) or nn.Identity()
    except (KeyError, ValueError) as error:
        raise ReclipError(f"{key} {name!r} does not work for {channels} channels: take BN") from error
