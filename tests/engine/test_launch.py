"""Processes of a training on the CPU: --num-processes, torchrun's and Slurm's variables."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reclip_d2.engine.launch import Place, first_host, place_in_environment
from reclip_d2.engine.launch_checks import check_config_for, check_processes
from reclip_d2.engine.program import argument_parser
from reclip_d2.errors import ReclipError
from tests.cli.conftest import write_inputs

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1040007",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],login",
}  # fmt: skip


def test_torchrun():
    assert place_in_environment(TORCHRUN) == Place(3, 4, 1, "tcp://node1:29500", "torchrun")
    assert place_in_environment({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None
    assert place_in_environment({}) is None and place_in_environment({"RANK": "0"}) is None


def test_slurm():
    assert place_in_environment(SLURM) == Place(2, 4, 0, "tcp://gpu03:20007", "Slurm")
    named = place_in_environment({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "5000"})
    assert named.address == "tcp://head:5000"
    # A batch script, which srun has not started, is one process.
    assert place_in_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node7", "node7"), ("a-1.site,b", "a-1.site"), ("gpu[003,005-9]", "gpu003"), ("x[1-2],y", "x1")],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x' and should be a number: torchrun sets it"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({**TORCHRUN, "RANK": "4"}, "RANK 4"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "not MASTER_ADDR"),
        ({**SLURM, "SLURM_JOB_ID": "9" * 40}, "SLURM_JOB_ID is"),
        ({**SLURM, "SLURM_STEP_NODELIST": "[]"}, "set MASTER_ADDR"),
    ],
)
def test_wrong_environments(environment, message):
    with pytest.raises(ReclipError) as caught:
        place_in_environment(environment)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def processes(*words: str) -> int:
    return check_processes(argument_parser().parse_args(list(words)))


def test_the_number_of_processes(monkeypatch):
    assert processes() == 1 and processes("--num-processes", "3") == 3
    for words, message in (
        (("--num-processes", "0"), "--num-processes 0"),
        (("--num-processes", "2", "--num-machines", "2"), "--num-processes is for the CPU of one machine"),
    ):
        with pytest.raises(ReclipError, match=message):
            processes(*words)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert processes() == 4
    with pytest.raises(ReclipError, match="torchrun has started 4 processes: omit --num-gpus"):
        processes("--num-processes", "2")


def test_processes_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch, tmp_path):
    from reclip_d2.config import load_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = load_config("", ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cuda"])
    with pytest.raises(ReclipError, match="MODEL.DEVICE is cuda: set it to cpu"):
        check_config_for(cfg, 2, on_cpu=True)


# ---- whole runs ---------------------------------------------------------------------------------------------------

KEYS = {
    "MODEL.DEVICE": "cpu", "MODEL.CLIP.NAME": "reclip-embedded", "MODEL.CLIP.TEMPLATES": "photo",
    "DATASETS.TRAIN": "('custom',)", "DATASETS.TEST": "()", "DATASETS.CUSTOM.IMAGES": "photos",
    "DATASETS.CUSTOM.CLASSES": "classes.txt", "DATALOADER.NUM_WORKERS": "0", "HYPOTHESIS.WINDOW_RATIO": "0.5",
    "HYPOTHESIS.FILE": "hypotheses.jsonl", "SOLVER.IMS_PER_BATCH": "4", "SOLVER.MAX_ITER": "4",
    "SOLVER.CHECKPOINT_PERIOD": "2", "SEED": "0", "INPUT.CROP.SIZE": "(48, 48)", "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "TEST.EVAL_PERIOD": "0", "SOLVER.REFERENCE_WORLD_SIZE": "0", "SOLVER.PLATEAU.ENABLED": "False",
}  # fmt: skip
# Without Gumbel noise, which each process draws for itself.
NO_NOISE = {"MODEL.LOSS.CONTRASTIVE_WEIGHT": "0.0", "MODEL.LOSS.COVERAGE_WEIGHT": "1.0"}


def command(output: str, *flags: str, method: str = "reclippp_rectify", **keys: str) -> list[str]:
    pairs = [part for pair in {**KEYS, "OUTPUT_DIR": output, **keys}.items() for part in pair]
    files = [ROOT / "configs" / name for name in ("datasets/custom-reclip-embedded.yaml", f"methods/{method}.yaml")]
    config = [word for file in files for word in ("--config-file", str(file))]
    return [sys.executable, "-m", "reclip_d2.train_net", *config, *flags, *pairs]


def start(folder: Path, words: list[str], **environment: str) -> subprocess.Popen:
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RECLIP_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        words, cwd=folder, env={**base, **environment}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def run(folder: Path, words: list[str]) -> str:
    process = start(folder, words)
    error = process.communicate(timeout=280)[1]
    assert process.returncode == 0, error[-3000:]
    return error


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / output / "model_final.pth", weights_only=True)["model"]


def assert_close(first: dict, second: dict) -> None:
    """float32 weights after four steps: the sums of a batch are added in another order."""
    for name, value in first.items():
        if "running_var" in name:  # SyncBN of Detectron2 on the CPU keeps the biased variance
            torch.testing.assert_close(value, second[name], rtol=1e-2, atol=1e-5)
        elif "num_batches_tracked" not in name:  # which that layer does not count
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.fixture
def inputs(tmp_path):
    write_inputs(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_two_processes_train_as_one(inputs):
    keys = {**NO_NOISE, "MODEL.MASK_DECODER.NORM": "SyncBN"}
    run(inputs, command("one", **keys))
    run(inputs, command("two", "--num-processes", "2", **keys))
    assert_close(weights(inputs, "one"), weights(inputs, "two"))
    assert json.loads((inputs / "two" / "training.json").read_text())["processes"] == 2

    # As torchrun starts them.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [
        start(inputs, command("torchrun", **keys), **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)
    ]
    for process in both:
        error = process.communicate(timeout=280)[1]
        assert process.returncode == 0, error[-3000:]
    for name, value in weights(inputs, "two").items():
        assert torch.equal(value, weights(inputs, "torchrun")[name]), name

    # Two processes begin, one goes on; and the other way round.
    for first, then in (("2", "1"), ("1", "2")):
        output = f"resumed{first}"
        run(inputs, command(output, "--num-processes", first, **keys))
        (inputs / output / "model_final.pth").unlink()
        (inputs / output / "last_checkpoint").write_text("model_0000001.pth")
        run(inputs, command(output, "--num-processes", then, "--resume", **keys))
        assert_close(weights(inputs, "one"), weights(inputs, output))


@pytest.mark.slow
def test_two_processes_distil_as_one(inputs):
    keys = {
        "MODEL.STUDENT.WEIGHTS": "", "MODEL.RESNETS.DEPTH": "18", "MODEL.RESNETS.RES2_OUT_CHANNELS": "8",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": "8", "MODEL.RESNETS.NORM": "SyncBN", "SOLVER.MAX_ITER": "2",
    }  # fmt: skip
    run(inputs, command("one", method="maskclip_plus", **keys))
    run(inputs, command("two", "--num-processes", "2", method="maskclip_plus", **keys))
    assert_close(weights(inputs, "one"), weights(inputs, "two"))


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_one_line(inputs):
    process = start(inputs, command("out", "--num-processes", "2", **{"SOLVER.MAX_ITER": "100000"}))
    log = inputs / "out" / "metrics.json"
    end = time.monotonic() + 200
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    killed = time.monotonic()
    os.kill(int(workers[-1]), signal.SIGKILL)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and time.monotonic() - killed < 60
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert lines and "Traceback" not in error, error
    assert all("another process of this run died" in line or "was killed by SIGKILL" in line for line in lines)
