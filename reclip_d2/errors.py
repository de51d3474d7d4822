"""User-facing errors: one clear line that names the file or key and the remedy."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

# What a RuntimeError says when memory ran out: CUDA, the CPU's allocator (two spellings), cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_KILLED_WORKER = re.compile(r"DataLoader worker .* is killed by signal: (Killed|Bus error)")
_ENDED_WORKER = re.compile(r"DataLoader worker .*(is killed by signal: \w+( \w+)?|exited unexpectedly)")
# What gloo and NCCL say in the other processes when one has gone.
_LOST_PEER = re.compile(
    r"gloo.*(closed by peer|reset by peer|Broken pipe|timed out)|remote process exited", re.IGNORECASE | re.DOTALL
)
_WANTED = re.compile(r"tried to allocate (\d+(?:\.\d+)? ?\w+)", re.IGNORECASE)

_LARGE_IMAGES = "set TEST.SLIDING_WINDOW.ENABLED True, or lower its SIZE, INPUT.MIN_SIZE_TEST or TEST.BAND_MEMORY"
# What to lower, by the module in which memory ran out: of the modules on the stack the innermost that stands here.
_REMEDIES = {
    "reclip_d2.hypothesis": "lower HYPOTHESIS.BATCH_SIZE",
    "reclip_d2.data.datasets.preparation": "lower --workers",
    "reclip_d2.engine.calibration": "lower INPUT.MIN_SIZE_TEST",
    "reclip_d2.inference": _LARGE_IMAGES,
    "detectron2.evaluation": _LARGE_IMAGES,
    "detectron2.engine.train_loop": "lower SOLVER.IMS_PER_BATCH or INPUT.CROP.SIZE",
}
_ANY_REMEDY = (
    "lower SOLVER.IMS_PER_BATCH or INPUT.CROP.SIZE (training), HYPOTHESIS.BATCH_SIZE (hypotheses), or set"
    " TEST.SLIDING_WINDOW.ENABLED True (evaluation)"
)
_LONGEST_LINE = 1200  # characters


class ReclipError(Exception):
    """A mistake of the user's. The message is one line: what is wrong, where, and the remedy."""

    exit_status = 1
    """Of the program that it ends."""


class UsageError(ReclipError):
    """A mistake in the arguments of a command, found after these were parsed."""

    exit_status = 2


def out_of_memory_message(error: BaseException) -> str | None:
    """The line for an error that means that memory ran out, with the key to lower; None for any other error.

    The key follows from the stack: hypotheses, training and evaluation have one each.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _KILLED_WORKER.search(f"{text} {error.__cause__}"):
        return "a data-loading process was killed, for want of memory or shared memory: lower DATALOADER.NUM_WORKERS"
    on_gpu = _is_of(error, "OutOfMemoryError", "torch")
    if (
        not on_gpu
        and not isinstance(error, MemoryError)
        and not (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text))
    ):
        return None
    device = "GPU" if on_gpu or re.search(r"CUDA|CUBLAS|CUDNN", text) else "CPU"
    wanted = _WANTED.search(text)
    return f"out of {device} memory{f' ({wanted[1]} more were wanted)' if wanted else ''}: {_remedy(error)}"


def _is_of(error: BaseException, name: str, module: str) -> bool:
    """Whether an error is of a class of a module. That is not imported here: then none of its errors can have been
    raised, and a command's help or a mistake in its arguments need not wait for the import."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _remedy(error: BaseException) -> str:
    for module in reversed(_modules_on_the_stack(error)):
        for prefix, remedy in _REMEDIES.items():
            if module == prefix or module.startswith(f"{prefix}."):
                return remedy
    return _ANY_REMEDY


def is_user_error(error: BaseException | None) -> bool:
    """Whether an error is a :class:`ReclipError`, or memory that ran out: no matter of the file that was being read."""
    return isinstance(error, ReclipError) or (error is not None and out_of_memory_message(error) is not None)


def error_line(error: BaseException | None) -> str | None:
    """The line for an error that is no bug of ours; None for one that is.

    Besides :class:`ReclipError` and memory that ran out: a file that cannot be written or read (a full disk, missing
    permission), an address that cannot be reached, and a process of ours that was killed.
    """
    if isinstance(error, ReclipError):
        return _last_line(error)
    if error is None:
        return None
    return out_of_memory_message(error) or _lost_process_line(error) or _system_line(error)


def _last_line(error: ReclipError) -> str:
    """The message. A data-loading worker's error comes with the worker's traceback in front: only its end counts."""
    text = str(error).strip() or "no message"
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return _one_line(text.removeprefix(f"{ReclipError.__module__}.{ReclipError.__qualname__}: "))


def _shortened(line: str) -> str:
    """Of a line with a very long name that someone has typed the begin and the end."""
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2
    return f"{line[:half]} ... {line[-half:]}"


def _system_line(error: BaseException) -> str | None:
    """What the operating system refused: the file, and why."""
    if not isinstance(error, OSError):
        return None
    if _is_of(error, "URLError", "urllib.error"):  # HTTPError is one, too
        address = getattr(error, "url", None) or "an address"
        reason = getattr(error, "reason", None) or error
        return _one_line(f"{address} cannot be fetched ({reason}): check the network, or name a local file")
    if error.strerror is None:
        return None
    file = error.filename if error.filename is not None else "a file"
    file = file.decode("utf-8", "backslashreplace") if isinstance(file, bytes) else file
    return _one_line(f"{file}: {error.strerror}")


def _lost_process_line(error: BaseException) -> str | None:
    """What is said of a run whose data-loading worker or other process has ended before its time."""
    found = _ENDED_WORKER.search(f"{error} {error.__cause__}") if isinstance(error, RuntimeError) else None
    if found is not None or _is_of_a_loader_s_connection(error):
        cause = found[0] if found else "it was killed"
        return f"a data-loading process has ended ({cause}): repeat the command, or set DATALOADER.NUM_WORKERS 0"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
        return "another process of this run has ended: see its message, and repeat the command"
    return None


def _is_of_a_loader_s_connection(error: BaseException) -> bool:
    """Whether a worker has gone between the message that a batch is ready and the batch itself, in shared memory."""
    if not isinstance(error, OSError | EOFError):
        return False
    modules = _modules_on_the_stack(error)
    return "torch.utils.data.dataloader" in modules and "multiprocessing.connection" in modules


def _modules_on_the_stack(error: BaseException) -> list[str]:
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_on_error(
    main: Callable[..., Result] | None = None,
    *,
    interrupted: str = "interrupted",
    words: Callable[[str], str] = str,
) -> Callable[..., Any]:
    """Decorate a program's ``main``: an error that is no bug (see :func:`error_line`) becomes ``error: <message>`` on
    standard error and exit status 1 (2 for a :class:`UsageError`), Ctrl-C one line and exit status 130, both without a
    traceback. Every other exception passes: it is a bug of ours.

    Args:
        interrupted: what Ctrl-C prints.
        words: changes a message, for a program that calls things by other names.
    """
    if main is None:
        return functools.partial(exit_on_error, interrupted=interrupted, words=words)

    @functools.wraps(main)
    def wrapper(*args: object, **kwargs: object) -> Result:
        logging.raiseExceptions = False  # where the disk is full, each line of a log would print a traceback
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            if multiprocessing.parent_process() is None:  # the others of a run were interrupted, too
                print(f"\n{interrupted}", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has gone, as in `reclip doctor | head -1`
            _silence(sys.stdout)
            sys.exit(1)
        except Exception as error:
            if _is_of(error, "ProcessExitedException", "torch.multiprocessing"):
                line = _exited_process_line(error)
            elif (line := error_line(error)) is None:
                raise
            if line:
                print(f"error: {_shortened(words(line))}", file=sys.stderr)
            sys.exit(error.exit_status if isinstance(error, ReclipError) else 1)

    return wrapper


def _exited_process_line(error: Exception) -> str:
    """What is said of a process of a multi-GPU run that has ended: "" if it has said its line itself."""
    if getattr(error, "exit_code", 1) == 130:
        sys.exit(130)
    name = getattr(error, "signal_name", None)
    if name is None:
        return ""
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"process {getattr(error, 'error_index', 0)} of this run was killed by {name}{hint}: repeat the command"


def _silence(stream: Any) -> None:
    """What is still to be written goes nowhere; at the end of the program, a second error would be printed."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
