"""The report's numbers by hand, and its pictures."""

import json
import re

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.experiments import charts
from reclip_d2.experiments.across import AcrossConditions, word_across
from reclip_d2.experiments.measurements import FAILS, HOLDS, MIXED, NOISE, UNKNOWN
from reclip_d2.experiments.report import busy_seconds, curve_values, write_report
from reclip_d2.experiments.runner import run_pending
from tests.experiments.tiny_suite import Worker, made_up_result, make_runs
from tests.visualization.test_bias_figures import assert_whole

SCORES = {
    "plain": 40.0,
    **{f"model-seed{seed}": 50.0 + seed for seed in range(3)},
    **{f"added-seed{seed}": 50.5 + seed * (1 - 0.5 * (seed == 1)) for seed in range(3)},  # 50.5, 51, 52.5
    **{f"student-seed{seed}": 45.0 + 2 * seed for seed in range(3)},  # 45, 47, 49
    **{f"sweep_1-seed{seed}": 30.0 + seed for seed in range(3)},
    **{f"sweep_2-seed{seed}": 20.0 + seed for seed in range(3)},
}


@pytest.fixture
def finished(tmp_path):
    """The small suite's runs, done with three seeds, each in 10 s, sequentially."""
    runs = make_runs(tmp_path, seeds=(0, 1, 2))
    run_pending(runs, Worker(SCORES), say=lambda line: None)
    for index, file in enumerate(sorted((tmp_path / "out" / "runs").glob("*/result.json"))):
        file.write_text(json.dumps({**json.loads(file.read_text()), "started": 10.0 * index, "seconds": 10.0}))
    return runs


def report_of(runs, path):
    files = write_report(AcrossConditions.of(runs), path, ["python", "tools/reproduce.py", "--out", "a folder"])
    assert files[0] == path and all(file.exists() for file in files)
    return path.read_text()


def section(page, title):
    return page[page.index(f"## {title}") :].partition("\n## ")[0]


def test_tables(finished, tmp_path):
    main = section(report_of(finished, tmp_path / "REPORT.md"), "Main: models")
    assert "| model | mIoU (%) | paper, VOC | training (s) |" in main
    assert "| Plain | 40.0 | 10.0 | none |" in main
    assert "| Model | 51.0 ± 1.0 | 12.5 | 4 |" in main
    assert "| Model with + | 51.3 ± 1.0 | ? | 4 |" in main  # mean of 50.5, 51, 52.5; deviation 1.04


def test_claims_with_numbers_and_explanations(finished, tmp_path):
    page = report_of(finished, tmp_path / "REPORT.md")
    main = section(page, "Main: models")
    # 10, 11, 12: 11 ± 4.303 / sqrt(3) = 2.48.
    assert "- **holds**: Model > Plain: +11.0 [+8.5, +13.5] (3 seeds). Table 1: VOC +2.5." in main
    # -0.5, 0, -0.5: mean -1/3, deviation 0.289, half width 0.717.
    assert "- **within noise**: Model > Added: -0.3 [-1.1, +0.4] (3 seeds). Table 2." in main
    assert "  Plain has 40.0, the model 51.0 ± 1.0, +11.0 [+8.5, +13.5] more, loss 0.500." in main
    # -5, -4, -3.
    extra = section(page, "Extra: students")
    assert "- **does not hold**: Student > Model: -4.0 [-6.5, -1.5] (3 seeds). Asked by us." in extra
    curve = section(page, "Curve: t")
    assert "- **holds**: Model, t = 0.1 > Model, t = 0.3: +10.0 [+10.0, +10.0] (3 seeds). Fig. 1." in curve
    summary = section(page, "What holds")
    # Of the papers: the first holds, as does the sweep's; below "added" lie both other points; the model is at par.
    assert "| claimed by the papers | 2 | 2 | 2 | 0 |" in summary
    assert "| asked by us | 0 | 1 | 0 | 0 |" in summary
    assert "± 4.30 standard errors" in summary
    assert "- Main: Model > Added: within noise" in summary and "Student >" not in summary


def test_an_explanation_is_for_what_does_not_hold_alone(tmp_path):
    runs = make_runs(tmp_path, seeds=(0, 1))
    run_pending(runs, Worker({"model-seed0": 90.0, "model-seed1": 90.0}), say=lambda line: None)
    main = section(report_of(runs, tmp_path / "REPORT.md"), "Main: models")
    assert "**holds**: Model > Added: +40.0 [+40.0, +40.0] (2 seeds)" in main and "Plain has" not in main


def test_explanations_of_another_suite_are_left_out(finished):
    measurements = AcrossConditions.of(finished)
    assert measurements.fill_in("{model} and {plain - model}") == "51.0 ± 1.0 and -11.0 [-13.5, -8.5]"
    assert measurements.fill_in("{plain: class_preference}") == "0.400"
    assert measurements.fill_in("{model} and {elsewhere}") == ""
    assert measurements.fill_in("{model: speed}") == ""
    assert measurements.fill_in("nothing to fill in") == "nothing to fill in"
    measurements.first.results["added"].clear()  # not run
    assert measurements.fill_in("{added}") == measurements.fill_in("{model - added}") == ""


def test_what_was_not_run(tmp_path):
    runs = make_runs(tmp_path, seeds=(0, 1), only=("model",))

    def perform(job, output):
        if job.folder.name == "model-seed1":
            raise ReclipError("the loss is not finite")
        return made_up_result(50.0, loss=1.0)

    run_pending(runs, perform, say=lambda line: None)
    page = report_of(runs, tmp_path / "REPORT.md")
    main = section(page, "Main: models")
    assert "| Plain | not run | 10.0 |  |" in main
    assert "| Model | 50.0 (1 of 2 seeds) | 12.5 | 4 |" in main
    assert "- **not run**: Model > Plain. Table 1: VOC +2.5." in main
    assert "Failed: `model`." in page
    # Nothing is claimed of a single seed.
    run_pending(make_runs(tmp_path, seeds=(0,)), Worker({"model-seed0": 90.0}), say=lambda line: None)
    main = section(report_of(make_runs(tmp_path, seeds=(0,)), tmp_path / "REPORT.md"), "Main: models")
    assert "**within noise**: Model > Plain: -" not in main and "(1 seed: noise unknown)" in main


def test_runs_of_another_config_do_not_count(finished, tmp_path):
    runs = make_runs(tmp_path, seeds=(0, 1, 2), options=("SOLVER.MAX_ITER", "7"))
    page = report_of(runs, tmp_path / "REPORT.md")
    assert "| Model | not run | 12.5 |  |" in page and "made with another config: `plain`, `model-seed0`" in page


def test_the_foot_is_from_the_results(finished, tmp_path):
    page = report_of(finished, tmp_path / "REPORT.md")
    foot = section(page, "How this was measured")
    assert "python tools/reproduce.py --out 'a folder'" in foot
    assert "19 runs in 3 min; their own times add up to 3 min." in foot
    assert "Machine: a machine." in foot and "Versions: Python 3." in foot
    assert "A small world." in page and "(made up)" in page
    assert "| `student` | student.yaml |  | model | 10 |" in page
    assert "| `added` | model.yaml | `MODEL.BIAS_HEAD.RECTIFICATION add` |  | 10 |" in page


def test_time_at_work():
    assert busy_seconds([]) == 0
    # Two at a time from 2 to 5, none from 6 to 9.
    assert busy_seconds([(9, 10), (0, 5), (2, 6)]) == 7
    assert busy_seconds([(0, 10), (1, 2), (3, 4)]) == 10


def test_pictures_stand_beside_the_report_and_are_linked(finished, tmp_path):
    page = report_of(finished, tmp_path / "docs" / "results.md")
    links = re.findall(r"\]\((images/.*?\.png)\)", page)
    assert sorted(links) == ["images/results_claims.png", "images/results_curve.png", "images/results_main.png"]
    assert all((tmp_path / "docs" / link).stat().st_size > 1000 for link in links)


def test_pictures_are_whole(finished):
    measurements = AcrossConditions.of(finished)
    tables = {table.key: table for table in measurements.suite.tables}
    values = curve_values(measurements.suite, tables["curve"])
    assert values == {"HYPOTHESIS.THRESHOLD": [0.1, 0.2, 0.3]}
    bars = charts.table_chart(measurements, tables["main"])
    widths = [patch.get_width() for patch in bars.axes[0].patches]
    assert widths == pytest.approx([40, 51, 51.333], abs=1e-3)
    curve = charts.curve_chart(measurements, tables["curve"], values)
    line = curve.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0.1, 0.2, 0.3] and line.get_ydata().tolist() == pytest.approx([31, 51, 21])
    claims = charts.claim_chart(measurements)
    assert len(claims.axes[0].get_yticks()) == 7
    for figure in (bars, curve, claims):
        assert_whole(figure)


def test_no_picture_of_nothing(tmp_path):
    measurements = AcrossConditions.of(make_runs(tmp_path))
    tables = {table.key: table for table in measurements.suite.tables}
    assert charts.table_chart(measurements, tables["main"]) is None
    assert charts.curve_chart(measurements, tables["curve"], {"HYPOTHESIS.THRESHOLD": [1, 2, 3]}) is None
    assert charts.claim_chart(measurements) is None
    page = report_of(make_runs(tmp_path), tmp_path / "REPORT.md")
    assert "not run" in page and page.endswith("No run is done yet.\n")


# ---- several data sets and CLIPs -----------------------------------------------------------------------------------

WORLDS = {
    "data/plain": 40.0,
    "hard/plain": 30.0,
    "data-clip1/plain": 40.0,
    "hard-clip1/plain": 30.0,
    **{
        f"{world}/model-seed{s}": level + s
        for world, level in (("data", 50), ("hard", 20), ("data-clip1", 50))
        for s in (0, 1, 2)
    },
    **{f"hard-clip1/model-seed{seed}": 29.0 + seed for seed in range(3)},
}


@pytest.fixture
def four(tmp_path):
    """Two data sets with two CLIPs each, done with three seeds."""
    runs = make_runs(tmp_path, seeds=(0, 1, 2), suite="worlds")
    run_pending(runs, Worker(WORLDS, runs.settings.out), say=lambda line: None)
    return runs


def test_columns_and_verdicts_of_several_conditions(four, tmp_path):
    page = report_of(four, tmp_path / "REPORT.md")
    main = section(page, "Main: models")
    # The data set with the lower scores first, each with its CLIPs.
    titles = ("`hard`", "`hard`, CLIP 1", "`data`", "`data`, CLIP 1")
    assert "| model | " + " | ".join(f"mIoU (%), {title}" for title in titles) + " | training (s) |" in main
    assert "| Plain | 30.0 | 30.0 | 40.0 | 40.0 | none |" in main
    assert "| Model | 21.0 ± 1.0 | 30.0 ± 1.0 | 51.0 ± 1.0 | 51.0 ± 1.0 | 4 |" in main
    # 20, 21, 22 - 30; 29, 30, 31 - 30; 50, 51, 52 - 40: the smallest first.
    assert "- **mixed**: Model > Plain. Table 1.\n  `hard`: -9.0 [-11.5, -6.5] (3 seeds), does not hold; " in main
    assert (
        "`hard`, CLIP 1: +0.0 [-2.5, +2.5] (3 seeds), within noise; `data`: +11.0 [+8.5, +13.5] (3 seeds), holds"
        in main
    )
    # Numbers of explanations are of the CLIPs of the configs.
    assert "  Plain has 30.0 / 40.0, the model 21.0 ± 1.0 / 51.0 ± 1.0, " in main
    extra = section(page, "Extra: students")
    assert "| model | mIoU (%), `hard` | mIoU (%), `data` | training (s) |" in extra
    summary = section(page, "What holds")
    assert (
        "| orderings | holds | does not hold | mixed | within noise | not run |\n|---|---|---|---|---|---|" in summary
    )
    assert "| **claimed by the papers, on all** | " in summary and "- Main: Model > Plain: mixed" in summary
    assert "CLIP 1 of `hard`: `python tools/pretrain_embedded_clip.py --world hard --seed 1 --out FILE`" in page


def test_pictures_of_several_conditions(four):
    measured = AcrossConditions.of(four)
    tables = {table.key: table for table in measured.suite.tables}
    bars = charts.table_chart(measured, tables["main"])
    assert [axes.get_title() for axes in bars.axes] == ["hard", "hard, CLIP 1", "data", "data, CLIP 1"]
    curve = charts.curve_chart(measured, tables["curve"], curve_values(measured.suite, tables["curve"]))
    assert len(curve.axes) == 2
    claims = charts.claim_chart(measured)
    for figure in (bars, curve, claims):
        assert_whole(figure)


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNKNOWN], HOLDS),
        ([HOLDS, NOISE], NOISE),
        ([FAILS, NOISE], FAILS),
        ([FAILS, FAILS], FAILS),
        ([HOLDS, NOISE, FAILS], MIXED),
        ([UNKNOWN], UNKNOWN),
    ],
)
def test_one_verdict_for_several_conditions(words, word):
    assert word_across(words) == word
