"""Where a run's losses, learning rate and pictures go."""

from __future__ import annotations

import importlib
import logging
import os

from detectron2.engine import default_writers
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter

logger = logging.getLogger(__name__)


def build_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers: the log, ``metrics.json``, and TensorBoard if it is installed."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        logger.warning("tensorboard is not installed: no event files are written (pip install tensorboard)")
        return [CommonMetricPrinter(max_iter), JSONWriter(os.path.join(output_dir, "metrics.json"))]
    return default_writers(output_dir, max_iter)
