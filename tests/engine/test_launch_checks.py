"""The settings of a training are checked before its processes start."""

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.engine import program
from reclip_d2.engine.launch_checks import check_config_for, check_processes, scale_to_processes
from reclip_d2.errors import ReclipError
from tests.helpers import config_arguments

CONFIG = config_arguments("embedded", "reclippp_rectify")


def arguments(*words: str):
    return program.argument_parser().parse_args(list(words))


@pytest.fixture
def gpus(monkeypatch):
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "words", "expected"),
    [
        (0, ("--num-gpus", "-3"), "--num-gpus -3"),
        (0, ("--num-gpus", "2"), "--num-gpus 2: this machine has 0"),
        (1, ("--num-gpus", "2"), "--num-gpus 2: this machine has 1"),
        (0, ("--num-machines", "0"), "--num-machines 0"),
        (0, ("--num-machines", "-1"), "--num-machines -1"),
        (0, ("--num-machines", "2"), "--num-machines 2: training on several machines needs GPUs"),
        (2, ("--num-machines", "2", "--num-gpus", "0"), "--num-machines 2: training on several machines needs GPUs"),
        (2, ("--num-machines", "2", "--dist-url", "auto"), "--dist-url auto"),
        (2, ("--num-machines", "2", "--dist-url", "nonsense"), "--dist-url nonsense"),
        (2, ("--num-machines", "2", "--machine-rank", "2"), "--machine-rank 2: give a rank from 0 to 1"),
        (0, ("--machine-rank", "-1"), "--machine-rank -1"),
        (0, ("--machine-rank", "1"), "--machine-rank 1"),
    ],
)
def test_wrong_machines(gpus, count, words, expected):
    gpus(count)
    with pytest.raises(ReclipError) as caught:
        check_processes(arguments(*words))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "words", "processes"),
    [
        (0, (), 1),
        (0, ("--num-gpus", "0"), 1),
        (0, ("--num-gpus", "1"), 1),
        (4, ("--num-gpus", "4", "--dist-url", "auto"), 4),
        (4, ("--num-gpus", "4", "--num-machines", "2", "--machine-rank", "1", "--dist-url", "tcp://host:1234"), 8),
    ],
)
def test_processes(gpus, count, words, processes):
    gpus(count)
    assert check_processes(arguments(*words)) == processes


@pytest.mark.parametrize(
    ("processes", "keys", "expected"),
    [
        (5, ("SOLVER.IMS_PER_BATCH", "12"), "SOLVER.IMS_PER_BATCH 12 is not a multiple of 5 processes"),
        (4, ("SOLVER.IMS_PER_BATCH", "8", "SOLVER.ACCUMULATE_STEPS", "3"), "SOLVER.ACCUMULATE_STEPS 3 exceeds"),
        (1, ("OUTPUT_DIR", "/proc/x"), "OUTPUT_DIR /proc/x: cannot write to"),
        (1, ("OUTPUT_DIR", "/dev/null"), "OUTPUT_DIR /dev/null"),
        (1, ("HYPOTHESIS.FILE", "s3://bucket/h.jsonl"), "HYPOTHESIS.FILE s3://bucket/h.jsonl is a URL"),
        (1, ("HYPOTHESIS.FILE", "/dev"), "HYPOTHESIS.FILE /dev is a folder"),
        (1, ("MODEL.DEVICE", "cuda:2"), "MODEL.DEVICE is cuda:2; this machine has 2 GPUs"),
    ],
)
def test_keys_that_do_not_fit(gpus, tmp_path, processes, keys, expected):
    gpus(2)
    cfg = load_config("", ["OUTPUT_DIR", str(tmp_path / "out"), *keys])
    with pytest.raises(ReclipError) as caught:
        check_config_for(cfg, processes)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_keys_that_fit(gpus, tmp_path):
    gpus(0)
    pairs = ["OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.ACCUMULATE_STEPS", "12"]
    check_config_for(load_config("", [*pairs, "MODEL.DEVICE", "cuda:7"]), 5)  # 12 images on each of five


def test_scaling_never_rounds_to_zero():
    cfg = load_config("", ["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.MAX_ITER", "1", "SOLVER.CHECKPOINT_PERIOD", "1"])
    cfg.freeze()
    scaled = scale_to_processes(cfg, 8)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.CHECKPOINT_PERIOD, scaled.SOLVER.IMS_PER_BATCH) == (1, 1, 96)
    assert scaled.is_frozen() and scale_to_processes(cfg, 1) is cfg


@pytest.mark.parametrize("path", ["s3://bucket/x", "file/x", "/proc/x", "."])
def test_a_hypothesis_file_that_cannot_be_made(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ReclipError, match="HYPOTHESIS.FILE"):
        check_config_for(load_config("", ["OUTPUT_DIR", str(tmp_path / "out"), "HYPOTHESIS.FILE", path]), 1)
    check_config_for(load_config("", ["OUTPUT_DIR", str(tmp_path / "out"), "HYPOTHESIS.FILE", "file"]), 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--num-gpus", "-3"), "--num-gpus -3"),
        (("--num-machines", "2"), "--num-machines 2"),
        (("MODEL.DEVICE", "mps"), "MODEL.DEVICE is 'mps'"),
        (("MODEL.DEVICE", "meta"), "MODEL.DEVICE is 'meta'"),
        (("SEED", "4294967296"), "SEED is 4294967296"),
        (("OUTPUT_DIR", "s3://bucket/x"), "OUTPUT_DIR is 's3://bucket/x'"),
        (("OUTPUT_DIR", "/proc/x"), "OUTPUT_DIR /proc/x: cannot write to"),
        (("SOLVER.BASE_RL", "1"), "did you mean SOLVER.BASE_LR?"),
        (
            ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            "MODEL.META_ARCHITECTURE 'GeneralizedRCNN' belongs to another task",
        ),
        (("MODEL.CLIP.NAME", "ViT-Z"), "MODEL.CLIP.NAME 'ViT-Z' is not known"),
    ],
)
def test_the_program_ends_with_one_line(gpus, tmp_path, monkeypatch, capsys, words, expected):
    gpus(0)
    monkeypatch.chdir(tmp_path)
    options = words if words[0].startswith("--") else ()
    pairs = () if options else words
    monkeypatch.setattr("sys.argv", ["train_net.py", *CONFIG, *options, *pairs])
    with pytest.raises(SystemExit) as caught:
        program.run_program(program.main)
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert list(tmp_path.iterdir()) == []
