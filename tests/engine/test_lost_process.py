"""A run with a killed process: one line, and no waiting for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Two processes on the CPU, started as train_net.py starts those of several GPUs; the second is killed on the way.
PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from reclip_d2.errors import exit_on_error

@exit_on_error
def main(rank, rendezvous, how):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        if how == "at once":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    dist.all_reduce(torch.ones(1))
    time.sleep(600)

@exit_on_error
def program():
    torch.multiprocessing.spawn(main, nprocs=2, args=tuple(sys.argv[1:]))

if __name__ == "__main__":
    program()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["at once", "while the other waits"])
def test_a_killed_process_ends_the_run(tmp_path, how):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(file), str(tmp_path / "rendezvous"), how],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 1 and time.monotonic() - start < 90
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr, result.stderr
    assert lines and all("another process of this run died" in x or "was killed by SIG" in x for x in lines)


def test_the_signal_is_named(capsys):
    from torch.multiprocessing import ProcessExitedException

    from reclip_d2.errors import exit_on_error

    name = signal.Signals(signal.SIGTERM).name

    @exit_on_error
    def main() -> None:
        raise ProcessExitedException("x", error_index=1, error_pid=3, exit_code=-signal.SIGTERM, signal_name=name)

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: process 1 of this run was killed by SIGTERM: repeat the command\n"
