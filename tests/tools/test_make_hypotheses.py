"""The program that makes the hypothesis file before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reclip_d2.toy import EMBEDDED, ensure_dataset
from tests.helpers import config_arguments, datasets, isolated_cache
from tests.workspace.test_ray_parts import HereEngine, cfg, files, in_folder
from tools import make_hypotheses

__all__ = ["cfg", "datasets", "isolated_cache"]
ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *keys: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DETECTRON2_DATASETS": str(tmp_path),
        "RECLIP_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "tools/make_hypotheses.py", *config_arguments("embedded", "reclippp_rectify")]
    command += ["OUTPUT_DIR", str(tmp_path / "out"), *keys]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.slow
def test_the_program_on_the_embedded_data_set(tmp_path):
    ensure_dataset(tmp_path / "embedded")
    file = tmp_path / "hypotheses.jsonl"
    # Whole windows of half the image: 9 a scene, so that 400 scenes take seconds.
    result = run(tmp_path, "HYPOTHESIS.FILE", str(file), "HYPOTHESIS.WINDOW_RATIO", "0.5")
    assert result.returncode == 0, result.stderr
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert header["dataset"] == "embedded_train" and header["window_ratio"] == 0.5
    assert len(lines) == EMBEDDED.split_counts["train"] and all(len(line["top1"]) == 9 for line in lines)
    row = next(line for line in result.stdout.splitlines() if line.startswith("desert"))
    desert = header["class_names"].index(["desert"])
    # t = 0.02 is below one window in nine: a class counts when any window shows it.
    assert int(row.split()[1]) == sum(desert in line["top1"] for line in lines)


@pytest.fixture
def call(cfg, monkeypatch, tmp_path, capsys):
    """Call the program in this process, with the test's config in a folder; returns what it prints."""

    def call(folder: str, *arguments: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(make_hypotheses, "setup", lambda args: in_folder(cfg, tmp_path / folder))
            make_hypotheses.main(make_hypotheses.parser().parse_args(list(arguments)))
        return capsys.readouterr().out

    return call


def test_makes_the_file_and_counts_classes(cfg, call, tmp_path):
    cfg.HYPOTHESIS.THRESHOLD = 0.02  # below one window in nine: a class counts when any window shows it
    printed = [line.split() for line in call("local").splitlines()]
    header, *lines = [json.loads(line) for line in (tmp_path / "local" / "hypotheses.jsonl").read_text().splitlines()]
    assert header["dataset"] == "reclip_test_train" and header["window_ratio"] == 0.5
    assert len(lines) == 3 and all(len(line["top1"]) == 9 for line in lines)
    for k, names in enumerate(header["class_names"]):
        count = sum(k in line["top1"] for line in lines)
        assert [*names[0].split(), str(count), f"{100 * count / 3:.1f}", "%"] in printed
    assert sum(int(words[-3]) for words in printed if words[-1] == "%") >= 3


def test_another_rule_is_refused_in_one_line(call, tmp_path, capsys):
    file = tmp_path / "other" / "hypotheses.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    with pytest.raises(SystemExit) as end:
        call("other")
    assert end.value.code == 1
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(file) in errors[0]
    assert "Traceback" not in out + err


def test_three_ways_to_the_same_files(call, tmp_path, monkeypatch):
    assert "sky" in call("local", "--features")
    assert "shard 2/2 is done; others are missing" in call("shards", "--features", "--shard", "2/2")
    assert "sky" in call("shards", "--features", "--shard", "1/2")
    engine = HereEngine()
    monkeypatch.setattr(make_hypotheses, "engine_of", lambda *options: engine)
    call("ray", "--engine", "ray", "--features")
    assert engine.asked == [["0", "1", "2"], ["0", "1", "2"]]
    assert files(tmp_path / "local") == files(tmp_path / "shards") == files(tmp_path / "ray")
    call("file", "--engine", "ray")
    assert [*files(tmp_path / "file")] == ["hypotheses.jsonl"]
