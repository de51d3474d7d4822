"""``tools/build_bank.py``: from a data set's training images to a bank, without opening a label."""

import importlib.util
from pathlib import Path

import pytest

from reclip_d2.engine import program
from reclip_d2.errors import ReclipError
from tests.helpers import config_arguments, datasets, watch_opened_files, write_scenes

__all__ = ["datasets"]

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("build_bank", ROOT / "tools" / "build_bank.py")
build_bank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_bank)
NAMES = ["sky", "lake", "lawn", "wood"]


@pytest.fixture
def keys(tmp_path, datasets) -> list[str]:
    records = write_scenes(tmp_path / "train", 3, size=(96, 96))
    datasets("bank_train", records, NAMES)  # with labels, which must stay closed
    datasets("bank_val", records, NAMES)
    return ["DATASETS.TRAIN", "('bank_train',)", "DATASETS.TEST", "('bank_val',)", "MODEL.DEVICE", "cpu"]


def run(*arguments: object) -> None:
    build_bank.main.__wrapped__(build_bank.argument_parser().parse_args([*map(str, arguments)]))


def test_made_without_labels_and_used(tmp_path, keys, capsys):
    config, output = config_arguments("embedded", "maskclip"), tmp_path / "new" / "bank.safetensors"

    def guard(path: str) -> None:
        assert "/annotations_detectron2/" not in path, f"the bank opens a label: {path}"

    with watch_opened_files(guard):
        run("--output", output, *config, *keys)
    assert "regions of 3 images (sky " in capsys.readouterr().out
    results = []
    for weight in ("0.0", "1.0"):
        bank = ["TEST.REFINE", "['bank']", "TEST.BANK.FILE", str(output), "TEST.BANK.WEIGHT", weight]
        arguments = [*config, "--eval-only", "OUTPUT_DIR", str(tmp_path / "out"), *keys, *bank]
        results.append(program.main(program.argument_parser().parse_args(arguments))["sem_seg"]["pACC"])
    assert results[0] != results[1]
    with pytest.raises(ReclipError, match=r"exists: remove it"):
        run("--output", output, *config, *keys)


def test_wrong_arguments(tmp_path, keys):
    config = config_arguments("embedded", "maskclip")
    with pytest.raises(ReclipError, match=r"name a \.safetensors file"):
        run("--output", tmp_path / "bank.pth", *config, *keys)
    bank = ["TEST.REFINE", "['bank']", "TEST.BANK.FILE", str(tmp_path / "none.safetensors")]
    with pytest.raises(ReclipError, match="none.safetensors"):
        program.run_config(program.argument_parser().parse_args([*config, "--eval-only", *keys, *bank]))
