"""User-facing errors: one clear line that names the file or key and the remedy."""

from __future__ import annotations

import functools
import re
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# What a RuntimeError says when memory ran out: CUDA, the CPU's allocator (two spellings), cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_KILLED_WORKER = re.compile(r"DataLoader worker .* is killed by signal: (Killed|Bus error)")
_WANTED = re.compile(r"tried to allocate (\d+(?:\.\d+)? ?\w+)", re.IGNORECASE)

_LARGE_IMAGES = "set TEST.SLIDING_WINDOW.ENABLED True, or lower its SIZE or INPUT.MIN_SIZE_TEST"
# What to lower, by the module in which memory ran out: of the modules on the stack the innermost that stands here.
_REMEDIES = {
    "reclip_d2.hypothesis": "lower HYPOTHESIS.BATCH_SIZE",
    "reclip_d2.data.datasets.preparation": "lower --workers",
    "reclip_d2.engine.calibration": "lower INPUT.MIN_SIZE_TEST",
    "reclip_d2.inference": "lower INPUT.MIN_SIZE_TEST or TEST.BAND_MEMORY",
    "detectron2.evaluation": _LARGE_IMAGES,
    "detectron2.engine.train_loop": "lower SOLVER.IMS_PER_BATCH or INPUT.CROP.SIZE",
}
_ANY_REMEDY = (
    "lower SOLVER.IMS_PER_BATCH or INPUT.CROP.SIZE (training), HYPOTHESIS.BATCH_SIZE (hypotheses), or set"
    " TEST.SLIDING_WINDOW.ENABLED True (evaluation)"
)


class ReclipError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and the remedy."""


def out_of_memory_message(error: BaseException) -> str | None:
    """The line for an error that means that memory ran out, with the key to lower; None for any other error.

    The key follows from the stack: hypotheses, training and evaluation have one each.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _KILLED_WORKER.search(f"{text} {error.__cause__}"):
        return "a data-loading process was killed, for want of memory or shared memory: lower DATALOADER.NUM_WORKERS"
    on_gpu = _is_of_torch(error, "OutOfMemoryError")
    if (
        not on_gpu
        and not isinstance(error, MemoryError)
        and not (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text))
    ):
        return None
    device = "GPU" if on_gpu or re.search(r"CUDA|CUBLAS|CUDNN", text) else "CPU"
    wanted = _WANTED.search(text)
    return f"out of {device} memory{f' ({wanted[1]} more were wanted)' if wanted else ''}: {_remedy(error)}"


def _is_of_torch(error: BaseException, name: str, module: str = "torch") -> bool:
    """Whether an error is of a class of torch. It is not imported here: then none of its errors can have been raised,
    and a command's help or a mistake in its arguments need not wait for the import."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _remedy(error: BaseException) -> str:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for module in reversed(modules):
        for prefix, remedy in _REMEDIES.items():
            if module == prefix or module.startswith(f"{prefix}."):
                return remedy
    return _ANY_REMEDY


def is_user_error(error: BaseException | None) -> bool:
    """Whether :func:`exit_on_error` says this error in one line: a :class:`ReclipError`, or memory that ran out."""
    return isinstance(error, ReclipError) or (error is not None and out_of_memory_message(error) is not None)


def _last_line(error: ReclipError) -> str:
    """The message. A data-loading worker's error comes with the worker's traceback in front: only its end counts."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[-1].removeprefix(f"{ReclipError.__module__}.{ReclipError.__qualname__}: ")


def exit_on_error(main: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a program's ``main``: a :class:`ReclipError`, or memory that ran out, becomes ``error: <message>`` on
    standard error and exit status 1, without a traceback. Every other exception passes: it is a bug of ours."""

    @functools.wraps(main)
    def wrapper(*args: object, **kwargs: object) -> Result:
        try:
            return main(*args, **kwargs)
        except ReclipError as error:
            print(f"error: {_last_line(error)}", file=sys.stderr)
            sys.exit(1)
        except Exception as error:
            if _is_of_torch(error, "ProcessExitedException", "torch.multiprocessing"):
                sys.exit(1)  # a process of a multi-GPU run, which has said its line itself
            message = out_of_memory_message(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(1)

    return wrapper
