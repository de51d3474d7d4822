"""Where logs go."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from reclip_d2.errors import error_line
from reclip_d2.utils.files import check_output_file

_FORMAT = "%(asctime)s %(name)s: %(message)s"
_LOGGERS = ("detectron2", "fvcore", "reclip_d2", "py.warnings", "huggingface_hub", "open_clip", "root")


class PlainFormatter(logging.Formatter):
    """Messages without the terminal colours that libraries put into them: for files."""

    _COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

    def format(self, record: logging.LogRecord) -> str:
        return self._COLORS.sub("", super().format(record))


class UserErrorFilter(logging.Filter):
    """Keep the traceback of an error that is no bug out of Detectron2's log; its one line is printed at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and error_line(record.exc_info[1]) is not None)


def quiet_logging(output_dir: Path) -> None:
    """For programs that print a summary of their own: all logs go to ``log.txt`` in ``output_dir`` instead."""
    output_dir.mkdir(parents=True, exist_ok=True)
    check_output_file(output_dir / "log.txt", "log")
    handler = logging.FileHandler(output_dir / "log.txt", mode="w")
    handler.setFormatter(PlainFormatter(_FORMAT))
    for name in ("detectron2", "fvcore", "reclip_d2", "py.warnings"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)


@contextlib.contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Logs and warnings go to the end of ``log.txt`` in ``folder``, and nowhere else: the terminal has the progress."""
    folder.mkdir(parents=True, exist_ok=True)
    check_output_file(folder / "log.txt", "log")
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(PlainFormatter(_FORMAT))
    logging.captureWarnings(True)
    before = []
    for name in _LOGGERS:
        logger = logging.getLogger(None if name == "root" else name)
        before.append((logger, logger.level, logger.propagate, logger.handlers))
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]
    errors = UserErrorFilter()
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(errors)
    try:
        yield
    finally:
        loop.removeFilter(errors)
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers
        logging.captureWarnings(False)
        handler.close()
