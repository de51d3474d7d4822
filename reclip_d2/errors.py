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

# Text of an out-of-memory RuntimeError: CUDA, the CPU allocator (two spellings), cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_KILLED_WORKER = re.compile(r"DataLoader worker .* is killed by signal: (Killed|Bus error)")
_ENDED_WORKER = re.compile(r"DataLoader worker .*(is killed by signal: \w+( \w+)?|exited unexpectedly)")
# Text of gloo's and NCCL's errors in the other processes when one has died.
_LOST_PEER = re.compile(
    r"gloo.*(closed by peer|reset by peer|Broken pipe|timed out)|remote process exited", re.IGNORECASE | re.DOTALL
)
_WANTED = re.compile(r"tried to allocate (\d+(?:\.\d+)? ?\w+)", re.IGNORECASE)

_LARGE_IMAGES = "set TEST.SLIDING_WINDOW.ENABLED True, or lower its SIZE, INPUT.MIN_SIZE_TEST or TEST.BAND_MEMORY"
# What to lower when memory runs out in a module; the innermost listed module on the stack decides.
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
    """A user's mistake. The message is one line: what is wrong, where, and the remedy."""

    exit_status = 1
    """Exit status of the program."""


class UsageError(ReclipError):
    """A mistake in a command's arguments, found after parsing."""

    exit_status = 2


def out_of_memory_message(error: BaseException) -> str | None:
    """The line for an out-of-memory error, with the key to lower; None for any other error.

    The traceback decides which key: hypotheses, training and evaluation each have their own.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _KILLED_WORKER.search(f"{text} {error.__cause__}"):
        return "a data-loading process ran out of memory or shared memory: lower DATALOADER.NUM_WORKERS"
    on_gpu = _is_of(error, "OutOfMemoryError", "torch")
    if (
        not on_gpu
        and not isinstance(error, MemoryError)
        and not (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text))
    ):
        return None
    device = "GPU" if on_gpu or re.search(r"CUDA|CUBLAS|CUDNN", text) else "CPU"
    wanted = _WANTED.search(text)
    return f"out of {device} memory{f' (tried to allocate {wanted[1]})' if wanted else ''}: {_remedy(error)}"


def _is_of(error: BaseException, name: str, module: str) -> bool:
    """Whether an error is an instance of ``module.name``, without importing the module: if nobody has imported it, it
    raised no error, and ``--help`` need not wait for the import."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _remedy(error: BaseException) -> str:
    for module in reversed(_modules_on_the_stack(error)):
        for prefix, remedy in _REMEDIES.items():
            if module == prefix or module.startswith(f"{prefix}."):
                return remedy
    return _ANY_REMEDY


def is_user_error(error: BaseException | None) -> bool:
    """Whether an error is a :class:`ReclipError` or out of memory, as opposed to a defect of the file being read."""
    return isinstance(error, ReclipError) or (error is not None and out_of_memory_message(error) is not None)


def error_line(error: BaseException | None) -> str | None:
    """The line for an error that is not a bug in this package; None for a bug.

    Such errors are :class:`ReclipError`, out of memory, a file that cannot be read or written (full disk, missing
    permission), an unreachable address, and a killed process of the run.
    """
    if isinstance(error, ReclipError):
        return _last_line(error)
    if error is None:
        return None
    return out_of_memory_message(error) or _lost_process_line(error) or _system_line(error)


def _last_line(error: ReclipError) -> str:
    """The message. The error of a data-loading worker starts with the worker's traceback: keep its last line only."""
    text = str(error).strip() or "no message"
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return _one_line(text.removeprefix(f"{ReclipError.__module__}.{ReclipError.__qualname__}: "))


def _shortened(line: str) -> str:
    """The line with its middle cut out if it is very long, as with a long name that a user typed."""
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2
    return f"{line[:half]} ... {line[-half:]}"


def _system_line(error: BaseException) -> str | None:
    """The file and the reason of an operating-system error."""
    if not isinstance(error, OSError):
        return None
    if _is_of(error, "URLError", "urllib.error"):  # includes HTTPError
        address = getattr(error, "url", None) or "an address"
        reason = getattr(error, "reason", None) or error
        return _one_line(f"{address} cannot be fetched ({reason}): check the network, or name a local file")
    if error.strerror is None:
        return None
    file = error.filename if error.filename is not None else "a file"
    file = file.decode("utf-8", "backslashreplace") if isinstance(file, bytes) else file
    return _one_line(f"{file}: {error.strerror}")


def _lost_process_line(error: BaseException) -> str | None:
    """The line for a run whose data-loading worker or other process died."""
    found = _ENDED_WORKER.search(f"{error} {error.__cause__}") if isinstance(error, RuntimeError) else None
    if found is not None or _is_loader_connection_error(error):
        cause = found[0] if found else "it was killed"
        return f"a data-loading process died ({cause}): repeat the command, or set DATALOADER.NUM_WORKERS 0"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
        return "another process of this run died: see its message, and repeat the command"
    return None


def _is_loader_connection_error(error: BaseException) -> bool:
    """Whether a worker died after announcing a batch and before the batch was read from shared memory."""
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
    """Decorate a program's ``main`` so that expected errors end it without a traceback.

    An error that is not a bug (see :func:`error_line`) prints ``error: <message>`` to standard error and exits with
    status 1 (2 for a :class:`UsageError`); Ctrl-C prints one line and exits with status 130. All other exceptions are
    bugs, and pass through.

    Args:
        interrupted: what Ctrl-C prints.
        words: rewrites messages, for a program that uses other names for things.
    """
    if main is None:
        return functools.partial(exit_on_error, interrupted=interrupted, words=words)

    @functools.wraps(main)
    def wrapper(*args: object, **kwargs: object) -> Result:
        logging.raiseExceptions = False  # on a full disk, each log line would print a traceback
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            if multiprocessing.parent_process() is None:  # child processes are interrupted too: print once
                print(f"\n{interrupted}", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of the output has exited, as in `reclip doctor | head -1`
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
    """The line for a process of a multi-GPU run that died; "" if the process has printed its own."""
    if getattr(error, "exit_code", 1) == 130:
        sys.exit(130)
    name = getattr(error, "signal_name", None)
    if name is None:
        return ""
    hint = ", perhaps out of memory" if name == "SIGKILL" else ""
    return f"process {getattr(error, 'error_index', 0)} of this run was killed by {name}{hint}: repeat the command"


def _silence(stream: Any) -> None:
    """Discard buffered output, which would raise a second error when the program exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
