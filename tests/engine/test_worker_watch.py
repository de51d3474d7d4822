"""A stopped data-loading process ends the training, instead of blocking it forever."""

import os
import signal
import time

import pytest
import torch

from reclip_d2.engine.worker_watch import WorkerWatch, is_stopped
from reclip_d2.errors import exit_on_error


class _Stopping(torch.utils.data.Dataset):
    """Its process stops itself at the third image."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.zeros(2)


def test_a_stopped_worker_ends_the_run(capfd):
    WorkerWatch(seconds=0.4).start()
    start = time.monotonic()

    def read() -> None:
        images = iter(torch.utils.data.DataLoader(_Stopping(), num_workers=1))
        try:
            list(images)
        finally:
            images._shutdown_workers()  # otherwise torch's signal handler may raise after the test

    with pytest.raises(SystemExit) as caught:
        exit_on_error(read)()
    assert caught.value.code == 1 and time.monotonic() - start < 30
    # Whether torch sees the worker's end, or its own connection break, is chance.
    errors = capfd.readouterr().err
    assert errors.count("error: a data-loading process ") == 1 and "Traceback" not in errors


def test_states(tmp_path):
    process = os.fork()
    if process == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(process, os.WUNTRACED)
        assert is_stopped(process) and not is_stopped(os.getpid())
        WorkerWatch(seconds=0).look()  # not one of our data-loading processes: ignored
        assert is_stopped(process)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert not is_stopped(process)
