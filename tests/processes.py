"""Several connected processes on the CPU, for tests of distributed training."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


def run_processes(worker: Callable[..., None], folder: Path, *arguments: str, count: int = 2) -> None:
    """Call ``worker(rank, folder, *arguments)`` in new processes connected by gloo; an error in one fails the test.

    Args:
        worker: a function of a test module.
        folder: the workers leave their results in it.
        arguments: strings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{worker.__module__}:{worker.__name__}"
    logs = [folder / f"process_{rank}.log" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.processes", name, str(rank), str(count), str(folder), *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                )
            )
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(statuses), "\n".join(log.read_text()[-3000:] for log in logs)


def _work(name: str, rank: str, count: str, folder: str, *arguments: str) -> None:
    module, _, function = name.partition(":")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=int(rank), world_size=int(count))
    try:
        getattr(importlib.import_module(module), function)(int(rank), Path(folder), *arguments)
    finally:
        gc.collect()  # models that are still there refer to the group
        dist.destroy_process_group()


if __name__ == "__main__":
    _work(*sys.argv[1:])
