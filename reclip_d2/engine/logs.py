"""Logging."""

from __future__ import annotations

import logging
from pathlib import Path

from reclip_d2.errors import is_user_error


class UserErrorFilter(logging.Filter):
    """Keep the traceback of a user's mistake, or of memory that ran out, out of Detectron2's log; its one line is
    printed at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and is_user_error(record.exc_info[1]))


def quiet_logging(output_dir: Path) -> None:
    """For programs that print a summary of their own: all logs go to ``log.txt`` in ``output_dir`` instead."""
    output_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(output_dir / "log.txt", mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    for name in ("detectron2", "fvcore", "reclip_d2", "py.warnings"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
