"""Hides library messages that are meant for developers, not users."""

from __future__ import annotations

import logging
import warnings


def silence_library_messages() -> None:
    """Hide torch's messages while fvcore and Detectron2 are imported and describe the machine.

    Call it before importing them. This module imports nothing itself.
    """
    # torch.jit is deprecated, but fvcore and Detectron2 decorate functions with it, and `reclip export` traces with it.
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is ", category=category)
    # Without a GPU, torch warns when its extension builder is imported, which Detectron2 does to list versions.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")
