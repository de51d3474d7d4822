"""Load the compiled operators, and choose between them and their plain-PyTorch twins."""

from __future__ import annotations

import functools
import importlib
import logging
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

NOT_BUILT = "is not built"
OPERATORS = (
    "gumbel_softmax",
    "masked_average_pool",
    "rectify_and_pool",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_l1",
)
_BUILD_HINT = "build it with `pip install -e . --no-build-isolation`"


class _State:
    """Process-wide choice; a class attribute, so that torch.compile guards on it."""

    enabled: bool = True


class use_kernels:
    """Choose the compiled kernels (True, the default) or the plain-PyTorch twins (False), for the whole process.

    ``use_kernels(False)`` takes effect immediately; as a context manager it restores the previous choice on exit::

        with use_kernels(False):
            pooled, area = rectify_and_pool(...)   # the twin
    """

    def __init__(self, enabled: bool) -> None:
        self._previous = _State.enabled
        _State.enabled = bool(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _State.enabled = self._previous


def _load() -> str | None:
    """Load the extension. Returns None, or why it cannot be used."""
    try:
        importlib.import_module("reclip_d2._C")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "reclip_d2._C"
        return NOT_BUILT if missing else f"cannot be loaded ({str(error).splitlines()[0]})"
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.reclip_d2, name)]
    return f"is older than this code (it lacks {', '.join(lacking)})" if lacking else None


def _find_served() -> frozenset[str]:
    """Device types for which the loaded extension has kernels."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"} if _problem is None else {}
    return frozenset(device for device, key in keys.items() if has("reclip_d2::upsample_argmax", key))


# At import: the operators must exist before fake kernels and gradients are registered, and torch.compile needs plain
# values here.
_problem = _load()
_served = _find_served()


def extension_loaded() -> bool:
    """Whether the compiled operators are loaded (for the CPU at least)."""
    return _problem is None


@functools.cache
def _warn_once(device_type: str) -> None:
    """Warn once per device type without kernels."""
    reason = _problem or f"has no {device_type} kernels"
    logger.warning("The extension reclip_d2._C %s; falling back to plain PyTorch: %s.", reason, _BUILD_HINT)


def kernels_available(device_type: str) -> bool:
    """Whether there are compiled operators for ``device_type`` ("cpu", "cuda"); warns once if not."""
    if device_type in _served:
        return True
    if not torch.compiler.is_compiling():
        _warn_once(device_type)
    return False


def kernels_enabled(device_type: str) -> bool:
    """Whether calls on ``device_type`` use the compiled operators."""
    return _State.enabled and kernels_available(device_type)
