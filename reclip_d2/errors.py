"""User-facing errors: one clear line that names the file or key and the remedy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

from torch.multiprocessing import ProcessExitedException

Result = TypeVar("Result")


class ReclipError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and the remedy."""


def _last_line(error: ReclipError) -> str:
    """The message. A data-loading worker's error comes with the worker's traceback in front: only its end counts."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[-1].removeprefix(f"{ReclipError.__module__}.{ReclipError.__qualname__}: ")


def exit_on_error(main: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a program's ``main``: a :class:`ReclipError` becomes ``error: <message>`` on standard error
    and exit status 1, without a traceback. Every other exception passes: it is a bug of ours."""

    @functools.wraps(main)
    def wrapper(*args: object, **kwargs: object) -> Result:
        try:
            return main(*args, **kwargs)
        except ReclipError as error:
            print(f"error: {_last_line(error)}", file=sys.stderr)
            sys.exit(1)
        except ProcessExitedException:
            sys.exit(1)  # a process of a multi-GPU run, which has said its line itself

    return wrapper
