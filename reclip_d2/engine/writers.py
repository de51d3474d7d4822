"""Where a run's losses, learning rate and pictures go."""

from __future__ import annotations

import importlib
import logging
import os

from detectron2.engine import default_writers
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter

from reclip_d2.utils.files import check_output_file
from reclip_d2.utils.io import naming_errors

logger = logging.getLogger(__name__)


class _NamedErrors(EventWriter):
    """A writer whose errors name where it writes."""

    def __init__(self, writer: EventWriter, place: str) -> None:
        self.writer = writer
        self._place = place

    def write(self, **kwargs: object) -> None:
        with naming_errors(self._place):
            self.writer.write(**kwargs)

    def close(self) -> None:
        with naming_errors(self._place):
            self.writer.close()


def build_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers: the log, ``metrics.json``, and TensorBoard if it is installed."""
    metrics = os.path.join(output_dir, "metrics.json")
    check_output_file(metrics)
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        logger.warning("tensorboard is not installed: no event files are written (pip install tensorboard)")
        return [CommonMetricPrinter(max_iter), _NamedErrors(JSONWriter(metrics), metrics)]
    return [
        writer if isinstance(writer, CommonMetricPrinter) else _NamedErrors(writer, output_dir)
        for writer in default_writers(output_dir, max_iter)
    ]
