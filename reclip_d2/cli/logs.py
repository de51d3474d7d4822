"""Where logs go while a command runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from reclip_d2.engine.logs import UserErrorFilter

_LOGGERS = ("detectron2", "fvcore", "reclip_d2", "py.warnings", "huggingface_hub", "open_clip", "root")


@contextlib.contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Logs and warnings go to the end of ``log.txt`` in ``folder``, and nowhere else: the terminal has the progress."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
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
