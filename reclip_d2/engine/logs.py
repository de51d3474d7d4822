"""Logging, and the writers of losses, learning rates and images."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_writers
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter

from reclip_d2.config import flatten
from reclip_d2.engine.trackers import build_trackers
from reclip_d2.errors import error_line
from reclip_d2.utils.files import check_output_file
from reclip_d2.utils.io import naming_errors

_FORMAT = "%(asctime)s %(name)s: %(message)s"
_LOGGERS = ("detectron2", "fvcore", "reclip_d2", "py.warnings", "huggingface_hub", "open_clip", "root")


class PlainFormatter(logging.Formatter):
    """Removes the terminal colours that libraries put into messages: for files."""

    _COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

    def format(self, record: logging.LogRecord) -> str:
        return self._COLORS.sub("", super().format(record))


class UserErrorFilter(logging.Filter):
    """Drop log records with the traceback of an error that is not a bug; its line is printed at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and error_line(record.exc_info[1]) is not None)


def quiet_logging(output_dir: Path) -> None:
    """Send all logs to ``log.txt`` in ``output_dir``, for programs that print their own summary."""
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
    """Append logs and warnings to ``log.txt`` in ``folder`` only, since the terminal shows progress."""
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


class _NamedErrors(EventWriter):
    """A writer whose errors name the file or folder that it writes."""

    def __init__(self, writer: EventWriter, place: str) -> None:
        self.writer = writer
        self._place = place

    def write(self, **kwargs: object) -> None:
        with naming_errors(self._place):
            self.writer.write(**kwargs)

    def close(self) -> None:
        with naming_errors(self._place):
            self.writer.close()


def build_writers(cfg: CfgNode, max_iter: int) -> list[EventWriter]:
    """Those of ``TRACKERS.USE``; Detectron2's: the log, ``metrics.json``, and TensorBoard if it is installed."""
    # The trackers come first: TensorBoard's writer removes the images from the event storage.
    return [*build_trackers(cfg, flatten(cfg)), *_file_writers(cfg.OUTPUT_DIR, max_iter)]


def _file_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    metrics = os.path.join(output_dir, "metrics.json")
    check_output_file(metrics)
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        message = "tensorboard is not installed: no event files are written (pip install tensorboard)"
        logging.getLogger(__name__).warning(message)
        return [CommonMetricPrinter(max_iter), _NamedErrors(JSONWriter(metrics), metrics)]
    return [
        writer if isinstance(writer, CommonMetricPrinter) else _NamedErrors(writer, output_dir)
        for writer in default_writers(output_dir, max_iter)
    ]
