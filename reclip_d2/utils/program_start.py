"""The first import of every program: makes Ctrl-C one line while the libraries load, which takes seconds.

Once ``main`` runs, ``exit_on_error`` does that. Importing the package also filters the libraries' messages.
Programs leave transformers out until they need it, see :mod:`~reclip_d2.utils.lazy_transformers`.
"""

import multiprocessing
import sys
from types import TracebackType

from reclip_d2.utils.lazy_transformers import install_finder

_traceback = sys.excepthook


def _one_line_when_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception hook. Python still exits with the status of an interrupted program."""
    if not issubclass(kind, KeyboardInterrupt):
        _traceback(kind, error, trace)
    elif multiprocessing.parent_process() is None:  # its child processes were interrupted too
        print("\ninterrupted", file=sys.stderr)


sys.excepthook = _one_line_when_interrupted
install_finder()
