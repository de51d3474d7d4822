"""The benchmark program, at a size that takes seconds: its output, not the speed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from reclip_d2 import layers
from reclip_d2.layers import kernels_available
from tools import benchmark_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
    """Call the program in this process; those in which it measures memory see the environment."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark_kernels.py", *arguments])
        benchmark_kernels.main()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.skipif(not kernels_available("cpu"), reason="the extension is not built")
def test_figures_of_a_small_case(run, tmp_path, capsys):
    small = ["--vocabularies", "voc20", "--pixels", "64", "--batches", "2", "--no-upsample", "--repeats", "2"]
    run("--json", str(tmp_path / "figures.json"), "--methods", "ours", "eager", "--threads", "1", *small)
    report = json.loads((tmp_path / "figures.json").read_text())
    (result,) = report["results"]
    # Logits (2,16,20), bias (16,20), features (2,16,512) read in both passes; logits' and bias' gradients written; the
    # (4,512) result written, its gradient and itself read.
    read = 4 * (2 * 16 * 20 + 16 * 20 + 2 * 16 * 512)
    assert result["bytes_to_move"] == 2 * read + 4 * (2 * 16 * 20 + 16 * 20) + 3 * 4 * 4 * 512
    assert result["floor_seconds"] == pytest.approx(result["bytes_to_move"] / report["copy_bytes_per_second"])
    for figures in result["methods"].values():
        assert 0 < figures["min_seconds"] <= figures["median_seconds"]
        assert figures["peak_bytes"] >= 0
    assert result["methods"]["ours"]["over_ours"] == 1.0
    assert "| voc20, 64 px, batch 2 |" in capsys.readouterr().out


def test_losses_of_distillation_equal_their_eager_forms():
    for operator, vocabulary, function in (
        ("upsample_l1", "any", benchmark_kernels.eager_upsample_l1),
        ("upsample_cross_entropy", "voc20", benchmark_kernels.eager_upsample_cross_entropy),
    ):
        case = benchmark_kernels.Case(operator, vocabulary, 20, 32, 2, 21, 35)
        maps = benchmark_kernels.new_inputs(case, torch.device("cpu"), torch.float32, 0)
        inputs = [tensor for tensor in maps if tensor is not None]
        torch.testing.assert_close(function(*inputs), getattr(layers, operator)(*inputs))
        for name in ("ours", "eager", "twin"):
            benchmark_kernels.method(case, name, torch.device("cpu"))(maps)
        # Maps of (2,C,4,4) and (2,512,2,2) and the pixels read twice, a gradient written.
        student, teacher, pixels = 2 * 16 * 4 * len(maps.student[0]), 2 * 4 * 4 * 512, 2 * 21 * 35
        moved = {
            "upsample_l1": 3 * student + 2 * (teacher + pixels),
            "upsample_cross_entropy": 3 * student + 16 * pixels,
        }
        assert benchmark_kernels.bytes_to_move(case, maps) == moved[operator]


def test_methods_without_ours_is_an_error(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("--methods", "eager")
    assert end.value.code == 1
    assert capsys.readouterr().err.strip() == "error: --methods must name ours: the ratios are over it"
