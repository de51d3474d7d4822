"""A config as one flat dict."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Values by their full key, such as ``SOLVER.BASE_LR``."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
