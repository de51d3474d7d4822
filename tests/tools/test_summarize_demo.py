"""The summary of demo reports: means, spreads and gains by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("summarize_demo", ROOT / "tools" / "summarize_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_report(folder: Path, seed: int, published: float) -> Path:
    quality = {"precision": 0.5, "recall": 0.75, "classes_in_hypothesis": 3.0, "classes_per_image": 2.0}
    report = {
        "dataset": "embedded_val",
        "seed": seed,
        "maskclip": {"mIoU": 50.0, "IoU": {}},
        "mean_filter": {"mIoU": 52.0, "3x3": 52.0, "5x5": 51.0},
        "calibration": {"mIoU": 56.0, "class": 55.0, "position_class": 56.0},
        "reclippp": {"mIoU": published, "IoU": {}, "train_seconds": 10.0},
        "reclippp_no_bias": {"mIoU": 51.0, "IoU": {}, "train_seconds": 10.0},
        "reclippp_ext": {"mIoU": 60.0, "IoU": {}, "train_seconds": 20.0},
        "hypothesis": quality,
        "hypothesis_ext": {**quality, "precision": 0.25},
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_means_gains_and_spreads(tool, tmp_path):
    # 53, 54, 55: mean 54, sample standard deviation 1; 4 above MaskCLIP, 2 below the best control.
    folders = [write_report(tmp_path / f"d{seed}", seed, 53.0 + seed) for seed in (2, 0, 1)]
    page = tool.markdown([tool.read_report(folder) for folder in folders], folders)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert rows["MaskCLIP"] == "| MaskCLIP | 50.0 | 0.0 | -6.0 | none |"
    assert rows["ReCLIP++ (rectified, as published)"].split(" | ")[1:] == [
        "54.0 ± 1.0",
        "4.0 ± 1.0",
        "-2.0 ± 1.0",
        "10.0 |",
    ]
    assert rows["ReCLIP++ (rectified, our extensions)"].split(" | ")[1:4] == ["60.0", "10.0", "4.0"]
    assert rows["calibrated (ours)"] == "| calibrated (ours) | 0.25 | 0.75 | 3.00 | 2.00 |"
    assert "seeds 0 1 2" in page
    # Published minus no bias: 2, 3, 4.
    assert "What subtracting M_b adds to the published model, seed by seed: 3.0 ± 1.0 points." in page


def test_missing_report_is_one_line(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["summarize_demo.py", str(tmp_path), "--output", str(tmp_path / "r.md")])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "report.json" in error
    assert not (tmp_path / "r.md").exists()
