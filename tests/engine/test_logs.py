"""Logs and records go only to regular files (a pipe would block), without tracebacks of users' mistakes."""

import logging
import os

import pytest

from reclip_d2.config import load_config
from reclip_d2.engine.logs import UserErrorFilter, build_writers, logging_to, quiet_logging
from reclip_d2.engine.run_setup import log_to
from reclip_d2.errors import ReclipError
from tests.utils.test_files import watchdog

__all__ = ["watchdog"]


@pytest.mark.parametrize("start", [quiet_logging, log_to, lambda folder: logging_to(folder).__enter__()])
def test_a_log_that_is_a_pipe(tmp_path, start):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(ReclipError) as caught:
        start(tmp_path)
    assert str(caught.value) == f"log {tmp_path}/log.txt is a named pipe, not a regular file: name another"


def test_metrics_that_are_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    with pytest.raises(ReclipError, match=r"metrics\.json is a named pipe, not a regular file"):
        build_writers(load_config("", ["OUTPUT_DIR", str(tmp_path)]), 1)


def record(error: BaseException | None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord("detectron2", logging.ERROR, __file__, 1, "Exception during training:", (), info)


def test_a_users_mistake_is_kept_out_of_the_log_and_nothing_else():
    keep = UserErrorFilter().filter
    assert not keep(record(ReclipError("a clear line")))
    assert keep(record(ValueError("a bug")))
    assert keep(record(None))
