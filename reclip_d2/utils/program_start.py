"""The first import of every program: Ctrl-C while the libraries load, which takes seconds, is one line.

Once ``main`` runs, ``exit_on_error`` sees to that. The package, imported with this module, filters libraries' messages.
"""

import multiprocessing
import sys
from types import TracebackType

_traceback = sys.excepthook


def _one_line_when_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception hook. Python still ends with the status of an interrupted program."""
    if not issubclass(kind, KeyboardInterrupt):
        _traceback(kind, error, trace)
    elif multiprocessing.parent_process() is None:  # the processes that it started were interrupted, too
        print("\ninterrupted", file=sys.stderr)


sys.excepthook = _one_line_when_interrupted
