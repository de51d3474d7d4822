"""Set up a run: logging, seeds, config on disk.

Replaces Detectron2's ``default_setup`` and ``setup_logger``, which print the whole config and model at every start and
write terminal colours into files.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from torch import nn

from reclip_d2.engine.logs import PlainFormatter, UserErrorFilter
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import check_output_file
from reclip_d2.utils.io import atomic_write

logger = logging.getLogger(__name__)

# Name of a log level; at DEBUG, the config and the model are logged too.
LEVEL_VARIABLE = "RECLIP_LOG_LEVEL"
LOG_FILE = "log.txt"
_LOGGERS = ("detectron2", "fvcore", "reclip_d2")
_MARK = "_reclip_run"
_PLAIN = ("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")


class TerminalFormatter(logging.Formatter):
    """For terminals: time and logger in green, and the level of warnings and errors in red."""

    def __init__(self) -> None:
        super().__init__("\x1b[32m[%(asctime)s %(name)s]:\x1b[0m %(message)s", datefmt="%m/%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"\x1b[31m{record.levelname}\x1b[0m " if record.levelno >= logging.WARNING else ""
        return level + super().formatMessage(record)


def set_up_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Create ``OUTPUT_DIR``, start its log, write ``config.yaml`` and seed the random generators.

    Args:
        cfg: the config of the run.
        args: arguments of the command line, for the log; with ``eval_only``, cuDNN's benchmark mode is not set.

    Raises:
        ReclipError: the log level is unknown.
    """
    rank = comm.get_rank()
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    log_to(Path(cfg.OUTPUT_DIR), rank)
    logger.info("Process %d of %d", rank, comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Arguments: %s", args)
    text = cfg.dump()
    if comm.is_main_process():
        logger.debug("Config:\n%s", text)
        with atomic_write(Path(cfg.OUTPUT_DIR, "config.yaml")) as temporary:
            temporary.write_text(text, encoding="utf-8")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if precision := cfg.get("FLOAT32_PRECISION", ""):
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"


def log_to(folder: Path, rank: int = 0) -> None:
    """Log to ``log.txt`` in ``folder`` and, in the first process, to standard output. Replaces the handlers of earlier
    calls in this process.

    Args:
        folder: folder of the log.
        rank: rank of the process; each process has a separate file.

    Raises:
        ReclipError: the log level is unknown, or the log cannot be written.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ReclipError(f"{LEVEL_VARIABLE} is {level!r}; choose one of DEBUG, INFO, WARNING, ERROR")
    suffix = f".rank{rank}" if rank else ""
    check_output_file(folder / f"{LOG_FILE}{suffix}", "log")
    handlers: list[logging.Handler] = [
        logging.FileHandler(folder / f"{LOG_FILE}{suffix}", encoding="utf-8", errors="backslashreplace")
    ]
    handlers[0].setFormatter(PlainFormatter(*_PLAIN))
    if rank == 0:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setFormatter(TerminalFormatter() if sys.stdout.isatty() else PlainFormatter(*_PLAIN))
        handlers.append(terminal)
    for handler in handlers:
        setattr(handler, _MARK, True)
    before = {h for name in _LOGGERS for h in logging.getLogger(name).handlers if hasattr(h, _MARK)}
    for name in _LOGGERS:
        one = logging.getLogger(name)
        one.handlers = [h for h in one.handlers if h not in before] + handlers
        one.setLevel(level)
        one.propagate = False
    for handler in before:
        handler.close()
    loop = logging.getLogger("detectron2.engine.train_loop")
    if not any(isinstance(f, UserErrorFilter) for f in loop.filters):
        loop.addFilter(UserErrorFilter())


def describe_model(model: nn.Module) -> nn.Module:
    """Log the model's class and size, and all modules at debug level. Returns the model."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("Model: %s, %.2f M of %.2f M weights train", type(model).__name__, trained / 1e6, count / 1e6)
    logger.debug("Model:\n%s", model)
    return model
