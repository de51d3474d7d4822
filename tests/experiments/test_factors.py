"""Factors of a suite file: their experiments, two-way tables and claims; other systems' masks."""

import json
from pathlib import Path

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.experiments.across import AcrossConditions
from reclip_d2.experiments.plan import Runs, Settings, resolve
from reclip_d2.experiments.report import write_report
from reclip_d2.experiments.runner import estimated_time, run_pending
from reclip_d2.experiments.suite_file import load_suite
from tests.experiments.tiny_suite import SUITE, Worker, write_suite

ABLATIONS = Path(__file__).resolve().parents[2] / "configs" / "ablations"
FACTORS = """
factors:
  attention:
    of: [plain, model]
    variants: {naclip: {title: NACLIP, overrides: {MODEL.CLIP.DENSE_ATTENTION: naclip}}}
  refinement:
    test_time: true
    of: [plain, model, attention]
    variants:
      flip: {title: flip, overrides: {TEST.REFINE: [flip]}}
      all: {title: all, overrides: {TEST.REFINE: [flip, denoise]}}
sweeps:
"""
TABLES = """
tables:
  grid:
    title: "Grid: refinements"
    grid: {lines: [plain, model, attention], columns: refinement}
    claims:
      - {better: "{m}_{a}_all", worse: "{m}_all", for: {m: [plain, model], a: attention}, source: ours}
  peers:
    title: "Peers: published"
    rows:
      - {experiment: peer, paper: {VOC: 80.4}, source: a README}
      - {experiment: peer, title: Peer again, paper: {VOC: 81.5}}
"""
WITH_FACTORS = (
    SUITE.replace("\nsweeps:\n", FACTORS)
    .replace("\ntables:\n", TABLES)
    .replace("experiments:\n", "experiments:\n  peer: {title: Peer, kind: masks}\n", 1)
)


def factor_suite(folder, text=WITH_FACTORS):
    return load_suite(write_suite(folder, text), "small", ["grid", "peers"])


def factor_runs(folder, seeds=(0, 1), text=WITH_FACTORS, **settings):
    return Runs(factor_suite(folder, text), Settings(folder / "out", seeds, "cpu", **settings))


def test_variants_are_trained_or_evaluate_a_checkpoint(tmp_path):
    suite = factor_suite(tmp_path)
    found = suite.experiments
    assert (found["model_naclip"].kind, found["model_naclip"].teacher) == ("train", "")
    assert (found["model_naclip_flip"].kind, found["model_naclip_flip"].teacher) == ("evaluate", "model_naclip")
    assert (found["plain_naclip_all"].kind, found["plain_naclip_all"].teacher) == ("evaluate", "")
    assert found["model_naclip_flip"].title == "Model, NACLIP, flip" and found["plain_flip"].group == "ours"
    assert not found["plain_flip"].seeded and found["model_flip"].seeded
    cfg = resolve(suite, found["model_naclip_all"])
    assert cfg.MODEL.CLIP.DENSE_ATTENTION == "naclip" and cfg.TEST.REFINE == ["flip", "denoise"]
    grid, _ = suite.tables
    assert grid.grid.columns == ("none", "flip", "all")
    assert grid.grid.lines[0] == ("Plain", ("plain", "plain_flip", "plain_all"))
    assert [title for title, _ in grid.grid.lines] == ["Plain", "Model", "Plain, NACLIP", "Model, NACLIP"]
    assert [(claim.better, claim.worse) for claim in grid.claims] == [
        ("plain_naclip_all", "plain_all"),
        ("model_naclip_all", "model_all"),
    ]


def test_one_training_serves_all_test_time_variants(tmp_path):
    runs, jobs, worker = factor_runs(tmp_path), {}, Worker()

    def perform(job, output):
        jobs[job.folder.name] = dict(zip(job.options[::2], job.options[1::2], strict=True))
        return worker(job, output)

    assert run_pending(runs, perform, say=lambda line: None) == []
    trained = [name for name in worker.done if (tmp_path / "out" / "runs" / name / "model_final.pth").exists()]
    assert sorted(trained) == ["model-seed0", "model-seed1", "model_naclip-seed0", "model_naclip-seed1"]
    assert len(worker.done) == len(set(worker.done)) == 6 + 2 * 6
    weights = str(tmp_path / "out" / "runs" / "model_naclip-seed1" / "model_final.pth")
    assert jobs["model_naclip_flip-seed1"]["MODEL.WEIGHTS"] == weights and "MODEL.WEIGHTS" not in jobs["plain_flip"]
    # The same folder elsewhere has the same settings: the checkpoint counts by what it was trained with.
    settings = json.loads((tmp_path / "out" / "runs" / "model_flip-seed0" / "settings.json").read_text())
    assert "MODEL.WEIGHTS" not in settings and len(settings["teacher"]) == 16
    retrained = factor_runs(tmp_path, options=("SOLVER.BASE_LR", "0.5"))
    changed = {planned.name for planned in retrained.planned if planned.folder.changes(planned.settings)}
    assert "model_flip-seed0" in changed


def test_evaluations_of_checkpoints_are_estimated_as_evaluations(tmp_path):
    text = WITH_FACTORS.replace("text: A small world.", "seconds: {model.yaml: 1000, evaluate: 10}")
    # Two trainings; six evaluations without and four with a checkpoint.
    assert "12 runs to do, about 35 min" in estimated_time(factor_runs(tmp_path, seeds=(0,), text=text), 1)


def test_the_report_shows_a_grid_and_sources(tmp_path):
    runs = factor_runs(tmp_path)
    run_pending(runs, Worker({"plain_flip": 42.0, "model_all-seed0": 60.0}), say=lambda line: None)
    write_report(AcrossConditions.of(runs), tmp_path / "R.md", ["command"])
    page = (tmp_path / "R.md").read_text()
    assert "mIoU (%):\n\n| model | none | flip | all |\n|---|---|---|---|\n| Plain | 50.0 | 42.0 | 50.0 |" in page
    assert "| Model | 50.0 | 50.0 | 55.0 ± 7.1 |" in page
    assert "| model | mIoU (%) | paper, VOC | training (s) | published numbers from |" in page
    assert "| Peer | not run | 80.4 |  | a README |" in page and "| Peer again | not run | 81.5 |  |  |" in page


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("of: [plain, model]", "of: [plane]", "factors: attention: 'plane' is neither an experiment nor a factor"),
        ("of: [plain, model]", "of: plain", "factors: attention: expected a list of experiments and factors"),
        ("naclip: {title: NACLIP, ", "naclip: {", "factors: attention: naclip: no 'title'"),
        ("  attention:\n", "  student:\n", "factors: student: an experiment has the same name"),
        ("title: flip, overrides", "title: flip, override", "refinement: flip: unknown key 'override'"),
        ("columns: refinement", "columns: refine", "tables: grid: grid: 'refine' is not a factor"),
        ("lines: [plain, ", "lines: [plane, ", "tables: grid: grid: 'plane' is neither"),
        ("a: attention}", "a: attentions}", "tables: grid: for: expected a list of words or a factor"),
        ('worse: "{m}_all"', 'worse: "{m}_none"', "tables: grid: 'plain_none' is not an experiment"),
        ("for: {m: [plain, model], a: attention}", "for: 3", "tables: grid: for: expected NAME: values lines"),
        ("kind: masks}", "kind: masks, config: plain.yaml}", "peer: masks of another system have no config"),
        ("kind: masks}", "kind: masks, match: best}", "peer: match: only for masks, one of one-to-one"),
        (
            "  student:",
            "  again: {title: A, kind: evaluate, config: a.yaml, teacher: model}\n  student:",
            "experiments: again: an evaluation of a checkpoint takes its teacher's config",
        ),
    ],
)
def test_mistakes(tmp_path, old, new, message):
    assert WITH_FACTORS.count(old) >= 1
    with pytest.raises(ReclipError) as error:
        factor_suite(tmp_path, WITH_FACTORS.replace(old, new, 1))
    assert message in str(error.value) and "suite.yaml" in str(error.value)


# ---- masks of other systems ----------------------------------------------------------------------------------------


def test_masks_are_run_where_there_is_a_folder(tmp_path):
    assert not [p for p in factor_runs(tmp_path).planned if p.run.experiment.kind == "masks"]
    folder = tmp_path / "masks" / "data" / "peer"
    assert not [p for p in factor_runs(tmp_path, masks=tmp_path / "masks").planned if p.name == "peer"]
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"1")
    runs = factor_runs(tmp_path, masks=tmp_path / "masks", only=("peer",), dataset="embedded_dev")
    (planned,) = runs.selected
    assert planned.job.masks == str(folder) and planned.run.seed is None
    assert planned.cfg.DATASETS.TEST == ("embedded_dev",)
    run_pending(runs, Worker(), say=lambda line: None)
    assert not factor_runs(tmp_path, masks=tmp_path / "masks", only=("peer",), dataset="embedded_dev").pending()
    (folder / "a.png").write_bytes(b"12")  # other masks
    (changed,) = factor_runs(tmp_path, masks=tmp_path / "masks", only=("peer",), dataset="embedded_dev").selected
    assert changed.folder.changes(changed.settings)


# ---- the files of the project --------------------------------------------------------------------------------------


def test_the_matrix_of_the_embedded_worlds():
    suite = load_suite(ABLATIONS / "frontier.yaml", "embedded")
    runs = Runs(suite, Settings(Path("/nowhere"), (0, 1, 2), "cpu"))
    on = [planned for planned in runs.planned if planned.run.condition.key == "embedded_longtail"]
    # 9 attentions and 8 refinements, 2 more for 4 attentions; two methods without seeds, two with three.
    assert len(on) == (9 * 9 + 4 * 2) * (2 + 2 * 3)
    assert sum(planned.run.experiment.kind == "train" for planned in on) == 9 * 2 * 3
    cfg = {planned.run.experiment.key: planned.cfg for planned in on}
    assert cfg["shares_rec_radseg_all"].MODEL.CLIP.DENSE_ATTENTION == "radseg"
    assert cfg["shares_rec_radseg_all"].TEST.REFINE == ["flip", "bank", "denoise", "pamr", "region_vote"]
    assert cfg["calibration_estimated_naclip"].MODEL.MASKCLIP.CALIBRATION == "estimated"
    assert not any(experiment.kind == "masks" for experiment in suite.experiments.values())
    assert " h" in estimated_time(runs, 1)


@pytest.mark.parametrize(("name", "column", "naclip"), [("voc20", "VOC", 79.7), ("cityscapes19", "Cityscapes", 35.5)])
def test_the_papers_suites_of_photographs_have_the_frontier(name, column, naclip):
    suite = load_suite(ABLATIONS / "paper.yaml", name)
    tables = {table.key: table for table in suite.tables}
    assert {"II", "attention", "refinement", "frontier", "sliding", "peers"} <= set(tables)
    numbers = {row.experiment: row for row in tables["peers"].rows}
    assert numbers["peer_naclip"].paper["mIoU"][column] == naclip and "README" in numbers["peer_naclip"].source
    assert all(row.source for row in numbers.values() if row.paper["mIoU"])
    cfg = resolve(suite.on(suite.conditions[0]), suite.experiments["sliding_sclip"])
    assert cfg.TEST.SLIDING_WINDOW.SIZE == [224, 224] and cfg.TEST.SOFTMAX_SCALE == 40.0
    assert cfg.INPUT.MIN_SIZE_TEST == (560 if name == "cityscapes19" else 336)
    assert cfg.MODEL.CLIP.DENSE_ATTENTION == "sclip"


def test_two_files_must_agree(tmp_path):
    file = write_suite(tmp_path, SUITE.replace("text: A small world.", "also: more.yaml"))
    more = tmp_path / "more.yaml"
    more.write_text(WITH_FACTORS)
    assert "model_naclip_all" in load_suite(file, "small").experiments
    for old, new, message in [
        ("{TEST.BIAS.BIN_WIDTH: 8}", "{TEST.BIAS.BIN_WIDTH: 9}", "more.yaml has other common"),
        ("title: Plain,", "title: Plane,", "experiments: plain is another in more.yaml"),
    ]:
        more.write_text(WITH_FACTORS.replace(old, new, 1))
        with pytest.raises(ReclipError, match=message):
            load_suite(file, "small")
