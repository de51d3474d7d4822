"""ReCLIP and ReCLIP++ as a Detectron2 project: language-guided unsupervised semantic segmentation.

Importing the package alone loads neither torch nor Detectron2: :class:`Segmenter` is imported when it is asked for.
``reclip_d2.modeling`` registers the backbone and the meta-architectures with Detectron2, ``reclip_d2.data.datasets``
the data sets.
"""

from __future__ import annotations

import importlib
from typing import Any

from reclip_d2.utils.library_messages import silence_library_messages

__version__ = "0.1.0"
__all__ = ["ReclipError", "Segmenter"]

_EXPORTS = {"ReclipError": "reclip_d2.errors", "Segmenter": "reclip_d2.workspace.segmenter"}

silence_library_messages()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
