"""Validation of the judge without labels: its runs, the scores it is compared with, and the statistics."""

import importlib.util
from pathlib import Path

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_free import Reference
from reclip_d2.experiments import judge_scores as scores
from reclip_d2.experiments.judge_runs import read_runs
from reclip_d2.experiments.judge_scores import SCORES, Evidence, Predictions
from reclip_d2.experiments.judge_table import (
    Judged,
    caught,
    correlation_of_others_choice,
    loss_of_choice,
    losses_of_three,
    markdown,
    rank_correlation,
)

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "configs" / "ablations" / "judge.yaml"
spec = importlib.util.spec_from_file_location("judge_program", ROOT / "tools" / "judge_masks.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


# ---- the runs -------------------------------------------------------------------------------------------------


def test_every_run_of_the_file_is_a_valid_config():
    for name, run in read_runs(RUNS).items():
        pairs = [str(part) for pair in run.overrides.items() for part in pair]
        files = [str(ROOT / "configs" / "datasets" / "embedded.yaml"), str(ROOT / "configs" / "methods" / run.config)]
        cfg = load_config(files, pairs)
        assert cfg.FEATURE_STORE.KIND == "whole", name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("runs: []", "lists no runs"),
        ("runs: {a: {overrides: {}}}", "runs: a: the keys are"),
        ("runs: {a: {config: x.yaml, hypotheses: nice}}", "'nice'; choose true, wrong or all"),
    ],
)
def test_wrong_files(tmp_path, text, problem):
    (tmp_path / "runs.yaml").write_text(text)
    with pytest.raises(ReclipError, match=problem):
        read_runs(tmp_path / "runs.yaml")


# ---- the scores -----------------------------------------------------------------------------------------------


@pytest.fixture
def evidence():
    """Two images of 1 x 2 patches, two classes, and one window per image, which covers it."""
    log = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.5, 0.5]]).log()
    windows = torch.tensor([[[0.7, 0.3]], [[0.6, 0.4]]]).log()
    return Evidence(
        features=torch.tensor([[[[1.0], [-1.0]]], [[[1.2], [-1.2]]]]),
        reference=Reference((0, 1), ((1, 2), (1, 2)), log.exp()),
        mixture=log.exp(),
        shares=torch.tensor([0.75, 0.25]),
        log_probabilities=log,
        inside=torch.ones(1, 2),
        windows=windows,
        windows_uncalibrated=windows,
        colors=torch.tensor([[[[0.0, 0, 0], [3.0, 4, 0]]], [[[0.0, 0, 0], [0.0, 1, 0]]]]),
    )


def predictions(labels: list, flipped: list | None = None) -> Predictions:
    maps = torch.tensor(labels).view(2, 1, 2)
    return Predictions(maps, maps if flipped is None else torch.tensor(flipped).view(2, 1, 2), 0.3)


def test_scores_by_hand(evidence):
    found = predictions([0, 1, 0, 0], [0, 0, 0, 0])
    log = evidence.log_probabilities
    assert scores.dense_log_probability(evidence, found) == pytest.approx(
        float(log[0, 0] + log[1, 1] + log[2, 0] + log[3, 0]) / 4
    )
    assert scores.confidence(evidence, found) == -0.3
    assert scores.share_agreement(evidence, found) == pytest.approx(0)
    assert scores.share_agreement(evidence, predictions([0, 0, 0, 0])) == pytest.approx(-0.25)
    assert scores.flip_accuracy(evidence, found) == 0.75
    assert scores.flip_iou(evidence, found) == pytest.approx(100 * (3 / 4 + 0) / 2)
    windows = evidence.windows.exp()[:, 0]
    expected = 0.5 * float(windows[0].log().sum()) + float(windows[1, 0].log())
    assert scores.window_log_probability(evidence, found) == pytest.approx(expected / 2)
    hits = [0.5 * 0.7 + 0.6, 0.5 * 0.3]
    iou = [hits[0] / (1.5 + 1.3 - hits[0]), hits[1] / (0.5 + 0.7 - hits[1])]
    assert scores.window_iou(evidence, found) == pytest.approx(100 * sum(iou) / 2)
    assert scores.edge_contrast(evidence, found) == pytest.approx(5 / 1)
    assert scores.edge_contrast(evidence, predictions([0, 0, 0, 0])) == 0


def test_labels_that_explain_the_features_are_more_likely(evidence):
    right, wrong = predictions([0, 1, 0, 1]), predictions([0, 0, 1, 1])
    assert scores.likelihood(evidence, right) > scores.likelihood(evidence, wrong)


# ---- the statistics -------------------------------------------------------------------------------------------


def judged(run: str, miou: float, score: float, other: float = 0.0, **options: bool) -> Judged:
    return Judged(run, 0, options.get("final", True), options.get("oracle", False), miou, {"a": score, "b": other})


RUNS_OF_A_WORLD = [
    judged("maskclip", 50, 5), judged("calibrated", 60, 6), judged("good", 70, 5.5), judged("bad", 40, 5.2),
    judged("worse", 30, 1), judged("similar", 49, 1),
]  # fmt: skip


def test_statistics_by_hand():
    assert caught(RUNS_OF_A_WORLD, "a") == (0.5, 0.0)  # of bad and worse; of calibrated and good
    assert loss_of_choice(RUNS_OF_A_WORLD, "a") == 10
    assert losses_of_three(RUNS_OF_A_WORLD, "a") == [0, 0, 10, 0, 0, 0]
    assert rank_correlation([judged("x", m, s) for m, s in ((1, 1), (2, 3), (3, 2))], "a") == pytest.approx(0.5)


def test_the_choice_of_the_others():
    """Score a is right on the first data set, and b on the second: each chooses what fails on the other."""
    first = [judged("x", m, m, -m) for m in (1, 2, 3)]
    second = [judged("x", m, -m, m) for m in (1, 2, 3)]
    worlds = {"one CLIP 0": first, "one CLIP 1": first, "two CLIP 0": second}
    assert correlation_of_others_choice(worlds, "two") == ("a", pytest.approx(-1))
    assert correlation_of_others_choice(worlds, "one") == ("b", pytest.approx(-1))


def test_the_tables():
    def world() -> list[Judged]:
        runs = [("maskclip", 50), ("calibrated", 60), ("good", 70), ("bad", 40)]
        return [Judged(run, 0, True, False, m, dict.fromkeys(SCORES, float(m))) for run, m in runs]

    table = markdown({"one CLIP 0": world(), "two CLIP 0": world()})
    for name in SCORES:
        assert f"| {name} | 1.00 / 1.00 | 1.00 / 1.00 |" in table
    assert "| caught, of the runs worse than MaskCLIP by 2 points | 100 % | 100 % |" in table
    assert "leaving out two: the others choose" in table


# ---- the program ----------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path, capfd):
    for arguments, problem in ((["--runs", "nice"], "--runs nice"), (["--clip", "mars=x"], "--clip mars=x")):
        with pytest.raises(SystemExit):
            program.main(program.argument_parser().parse_args(["--out", str(tmp_path / "out"), *arguments]))
        assert problem in capfd.readouterr().err


@pytest.mark.slow
def test_validation_of_three_runs(tmp_path):
    arguments = ["--out", str(tmp_path), "--worlds", "embedded", "--runs", "shares", "calibrated_uniform"]
    table = program.main(program.argument_parser().parse_args(arguments))
    assert "(the judge)" in table and (tmp_path / "judge_dev.md").read_text() == table
    assert program.main(program.argument_parser().parse_args(arguments)) == table  # from the files
