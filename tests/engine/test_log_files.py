"""Logs and records go to regular files: a named pipe in a run's folder would be waited for."""

import os

import pytest

from reclip_d2.engine.logs import logging_to, quiet_logging
from reclip_d2.engine.run_setup import log_to
from reclip_d2.engine.writers import build_writers
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
        build_writers(str(tmp_path), 1)
