"""TorchScript files: traced and frozen, so that a file contains only what the graph uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reclip_d2.export.module import ExportModule

SUFFIXES = (".pt", ".torchscript")
# Inside the file, with the code: the content of classes.json.
DESCRIPTION = "classes.json"


def missing_packages() -> list[str]:
    """Packages to install before files of this format can be written and checked."""
    return []


def write(module: ExportModule, example: Tensor, path: Path, description: str) -> None:
    """Trace ``module`` with ``example`` and write the file.

    Args:
        description: stored in the file as ``classes.json``: ``torch.jit.load(path, _extra_files={"classes.json": ""})``
            reads it.
    """
    with warnings.catch_warnings():
        # The tracer warns about each Python condition on a size, most of them in Detectron2's layers. The check on
        # other sizes shows whether one of them matters.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, example, check_trace=False)
        # Freezing drops what is not read (CLIP's text tower), and folds batch norms into convolutions.
        frozen = torch.jit.freeze(traced.eval())
        # Via memory: on a full disk, torch's writing to a path aborts the process.
        with open(path, "wb") as file:
            torch.jit.save(frozen, file, _extra_files={DESCRIPTION: description})


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function of an image ``(1, 3, H, W)``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu")
