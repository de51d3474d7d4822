"""Messages of libraries that tell a user nothing: they are addressed to those who write programs."""

from __future__ import annotations

import logging
import warnings


def silence_library_messages() -> None:
    """Leave out what torch says when fvcore and Detectron2 are imported and when they describe the machine.

    Call it before they are imported. Nothing is imported here.
    """
    # torch.jit is deprecated: fvcore and Detectron2 decorate functions with it, `reclip export` traces with it.
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is ", category=category)
    # Without a GPU torch says so to all who import its compiler of extensions, as Detectron2's list of versions does.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")
