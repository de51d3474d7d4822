"""open_clip without transformers, until a text tower needs it: in this project's programs alone.

Where transformers is installed, open_clip imports it with its text towers, which few models have: a third more time to
start each program. With the finder of this module, open_clip is imported as if transformers were missing, and
:func:`use_transformers` gives it what it lacks. In other programs, which may use open_clip themselves, nothing changes;
nor does anything if another package has imported either before.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_NAMES = {
    "transformers": ("AutoModel", "AutoTokenizer", "AutoConfig", "PretrainedConfig"),
    "transformers.modeling_outputs": (
        "BaseModelOutput", "BaseModelOutputWithPooling", "BaseModelOutputWithPoolingAndCrossAttentions",
    ),
}  # fmt: skip
"""What ``open_clip.hf_model`` imports."""


class _WithoutTransformers(importlib.machinery.SourceFileLoader):
    """Runs a module in which ``import transformers`` fails, unless it is imported already."""

    def exec_module(self, module: ModuleType) -> None:
        if "transformers" in sys.modules:
            super().exec_module(module)
            return
        sys.modules["transformers"] = None  # type: ignore[assignment]
        try:
            super().exec_module(module)
        finally:
            del sys.modules["transformers"]


class _OpenClipFinder(importlib.abc.MetaPathFinder):
    """Finds open_clip, with :class:`_WithoutTransformers` as its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "open_clip":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _WithoutTransformers(spec.loader.name, spec.loader.path)
        return spec


def install_finder() -> None:
    """Let later imports of open_clip leave transformers out."""
    if not any(isinstance(finder, _OpenClipFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OpenClipFinder())


def use_transformers() -> None:
    """Import transformers, and give it to open_clip's text towers.

    Raises:
        ImportError: it is not installed.
    """
    towers = importlib.import_module("open_clip.hf_model")
    if towers.transformers is not None:
        return
    for module, names in _NAMES.items():
        for name in names:
            setattr(towers, name, getattr(importlib.import_module(module), name))
    towers.transformers = importlib.import_module("transformers")
