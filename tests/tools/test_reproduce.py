"""``tools/reproduce.py`` from a suite file to a report, on a data set of a few files."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from reclip_d2.utils.tensor_files import save_safetensors
from tests.helpers import datasets, isolated_cache
from tests.test_train_net import metrics, run, scene

__all__ = ["datasets", "isolated_cache", "scene"]

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("reproduce_program", ROOT / "tools" / "reproduce.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

SUITE = """
suites: {tiny: {dataset: config.yaml, paper: [VOC]}}
methods: .
common: {TEST.BIAS.ENABLED: true}
experiments:
  maskclip:
    title: MaskCLIP
    kind: evaluate
    config: method.yaml
    overrides: {MODEL.META_ARCHITECTURE: MaskCLIP}
    seeded: false
  model: {title: ReCLIP++ (rec.), kind: train, config: method.yaml}
  known:
    title: true shares
    kind: true_shares
    config: method.yaml
    overrides:
      MODEL.META_ARCHITECTURE: MaskCLIP
      MODEL.MASKCLIP.CALIBRATION: estimated
      LINEAR_PROBE.DATASETS: [reclip_test_train]
    seeded: false
  probe:
    title: ReCLIP++ (rec., LP)
    kind: probe
    teacher: model
    overrides:
      LINEAR_PROBE.DATASETS: [reclip_test_train]
      LINEAR_PROBE.MAX_ITER: 4
      LINEAR_PROBE.IMS_PER_BATCH: 2
  hypotheses:
    title: Hypotheses
    kind: hypotheses
    config: method.yaml
    overrides: {LINEAR_PROBE.DATASETS: [reclip_test_train]}
    seeded: false
  peer: {title: Peer, kind: masks}
  clusters: {title: Clusters, kind: masks, match: one-to-one}
tables:
  II:
    title: "Table II: models"
    main: true
    chart: true
    rows: [{experiment: maskclip, paper: {VOC: 49.5}}, {experiment: model, paper: {VOC: 73.5}}, {experiment: known}]
    claims: [{better: model, worse: maskclip, source: Table II}]
  I: {title: "Table I: linear probing", rows: [{experiment: probe}]}
  H: {title: Hypotheses, metrics: [precision, recall], rows: [{experiment: hypotheses}]}
  peers: {title: Peers, rows: [{experiment: peer, paper: {VOC: 80.4}, source: a paper}, {experiment: clusters}]}
"""


class SameProcess:
    """Stands in for ``Processes``: its processes would not know the test's data sets."""

    def __init__(self, threads: int, preload: tuple[str, ...]) -> None:
        self.stopped = False

    def call(self, function, argument, output):
        return function(argument)

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def reproduce(scene, monkeypatch):
    """``reproduce(*arguments)`` runs the program on the tiny suite."""
    (scene / "suite.yaml").write_text(SUITE)
    (scene / "method.yaml").write_text("MODEL: {META_ARCHITECTURE: RectifiedCLIP}\n")
    monkeypatch.setattr(program, "Processes", SameProcess)

    def call(*arguments: str) -> None:
        command = ["reproduce.py", "--suite", "tiny", "--out", str(scene / "out"), "--device", "cpu", "--jobs", "1"]
        monkeypatch.setattr(sys, "argv", [*command, "--suite-file", str(scene / "suite.yaml"), *arguments])
        program.main()

    return call


def mistake(capsys, reproduce, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        reproduce(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    *before, line = error.splitlines()
    assert line.startswith("error: ") and all(not x or " of " in x for x in before)  # progress
    return line


def test_a_suite_from_files_to_a_report(scene, reproduce, capsys):
    reproduce("--seeds", "0", "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "7 runs to do"
    assert [line.split()[1] for line in lines[1:8]] == [
        "maskclip:", "model-seed0:", "known:", "model-seed1:", "probe-seed0:", "hypotheses:", "probe-seed1:",
    ]  # fmt: skip
    assert lines[8] == f"Written: {scene}/out/REPORT.md and 2 pictures in {scene}/out/images"

    result = json.loads((scene / "out" / "runs" / "model-seed1" / "result.json").read_text())
    run(scene, "by_hand", "SEED", "1", "TEST.EVAL_PERIOD", "6")
    assert result["metrics"]["mIoU"] == metrics(scene, "by_hand")["sem_seg/mIoU"]
    assert -1 <= result["metrics"]["class_preference"]["score"] <= 1
    probe = json.loads((scene / "out" / "runs" / "probe-seed1" / "result.json").read_text())
    assert probe["supervision"] == "labels (linear probe)" and result["supervision"] == "none"
    assert probe["training"]["iterations"] == 4 and probe["teacher"] == "model-seed1"
    own = json.loads((scene / "out" / "runs" / "probe-seed1" / "linear_probe" / "linear_probe.json").read_text())
    assert own["probed"]["weights"] == f"{scene}/out/runs/model-seed1/model_final.pth"
    assert own["results"]["reclip_test_val"]["mIoU"] == probe["metrics"]["mIoU"]
    hypotheses = json.loads((scene / "out" / "runs" / "hypotheses" / "result.json").read_text())
    assert hypotheses["supervision"] == "labels (analysis of the hypotheses)" and hypotheses["training"] is None
    true = json.loads((scene / "out" / "runs" / "known" / "result.json").read_text())
    assert true["supervision"] == "labels (class shares)" and 0 <= true["metrics"]["mIoU"] <= 100
    records = DatasetCatalog.get("reclip_test_train")
    seen = [len(set(np.unique(Image.open(record["sem_seg_file_name"]))) - {255}) for record in records]
    assert hypotheses["metrics"]["classes_per_image"] == np.mean(seen)

    page = (scene / "out" / "REPORT.md").read_text()
    assert "on `reclip_test_val`, by" in page and "Model" not in page.splitlines()[0]
    assert "| maskclip" not in page.partition("## The runs")[0] and "| MaskCLIP |" in page
    assert f"--seeds 0 1 --out {scene}/out" in page
    # Once more: all is there.
    capsys.readouterr()
    reproduce("--seeds", "0", "1")
    assert capsys.readouterr().out.splitlines() == ["0 runs to do", *lines[8:]]


def test_masks_of_other_systems(scene, reproduce, capsys):
    for name, shift in (("peer", 0), ("clusters", 1)):
        folder = scene / "masks" / "config" / name
        folder.mkdir(parents=True)
        for record in DatasetCatalog.get("reclip_test_val"):
            labels = np.asarray(Image.open(record["sem_seg_file_name"]))
            moved = np.where(labels == 255, 0, (labels + shift) % 4).astype(np.uint8)
            Image.fromarray(moved).save(folder / f"{Path(record['file_name']).stem}.png")
    arguments = ("--tables", "peers", "--masks", str(scene / "masks"))
    reproduce(*arguments)
    assert capsys.readouterr().out.splitlines()[0] == "2 runs to do"
    page = (scene / "out" / "REPORT.md").read_text()
    assert "| Peer | 100.0 | 80.4 | none | a paper |" in page and "| Clusters | 100.0 |  | none |  |" in page
    assert f"--masks {scene}/masks" in page
    results = [json.loads((scene / "out/runs" / name / "result.json").read_text()) for name in ("peer", "clusters")]
    assert [result["supervision"] for result in results] == [
        "masks of another system",
        "masks of another system, matched by the labels",
    ]
    assert results[0]["metrics"]["class_preference"]["score"] == 1
    # Ids in another order, by their names.
    (scene / "masks/config/peer/names.txt").write_text("tall tree\nsky\nwater\nbrick wall\n")
    reproduce(*arguments, "--overwrite")
    moved = json.loads((scene / "out/runs/peer/result.json").read_text())["metrics"]
    assert moved["mIoU"] < 100 and moved["IoU"]["sky"] == 0
    # Without the folder the rows stay, as not run.
    reproduce("--tables", "peers", "--report-only")
    assert "| Peer | not run | 80.4 |" in (scene / "out" / "REPORT.md").read_text()
    assert "no folder <data set>/<experiment>" in mistake(capsys, reproduce, "--masks", str(scene / "nowhere"))


def test_list_and_report_only(scene, reproduce, capsys):
    reproduce("--list", "--seeds", "3", "4")
    out = capsys.readouterr().out
    assert "model       0/2 done  train       ReCLIP++ (rec.)  [II]" in out and out.endswith(
        "7 runs, 0 of them done; 7 runs to do\n"
    )
    assert not (scene / "out").exists()
    reproduce("--report-only", "--tables", "I", "--report", str(scene / "page.md"))
    page = (scene / "page.md").read_text()
    assert "| ReCLIP++ (rec., LP) | not run |" in page and "Table II" not in page
    assert "--tables I" in page and not (scene / "out").exists()


def test_mistakes(scene, reproduce, capsys):
    assert "--suite 'small' is not in" in mistake(capsys, reproduce, "--suite", "small")
    assert "no table 'III'" in mistake(capsys, reproduce, "--tables", "III")
    assert "no table has the experiment 'probes': see --list" in mistake(capsys, reproduce, "--experiments", "probes")
    assert "'nowhere'" in mistake(capsys, reproduce, "--dataset", "nowhere")
    assert "--jobs 0" in mistake(capsys, reproduce, "--jobs", "0")
    assert "experiment maskclip of suite tiny: command line: " in mistake(capsys, reproduce, "--opts", "NO.KEY", "1")
    for name in ("000", "001", "002"):
        (scene / "val" / "annotations_detectron2" / f"{name}.png").unlink()
    line = mistake(capsys, reproduce, "--seeds", "0")
    assert "run maskclip: label" in line and "does not exist" in line


def test_changes_are_refused_or_overwritten(scene, reproduce, capsys):
    few = ("--seeds", "0", "--experiments", "model", "--opts", "SOLVER.MAX_ITER")
    reproduce(*few, "1")
    line = mistake(capsys, reproduce, *few, "2")
    assert "run model-seed0 in" in line and "SOLVER.MAX_ITER is 2 now and was 1" in line
    reproduce(*few, "2", "--overwrite")
    file = scene / "out" / "runs" / "model-seed0" / "result.json"
    assert json.loads(file.read_text())["training"]["iterations"] == 2
    assert "--opts SOLVER.MAX_ITER 2" in (scene / "out" / "REPORT.md").read_text()


def test_a_failed_run_is_told_at_the_end(scene, reproduce, capsys, monkeypatch):
    def fail(job):
        raise program.ReclipError("no labels to probe with")

    monkeypatch.setattr(program, "perform_probe", fail)
    line = mistake(capsys, reproduce, "--seeds", "0", "--opts", "SOLVER.MAX_ITER", "1")
    assert "1 run failed" in line and "probe-seed0: failed: no labels to probe with" in line
    assert "| ReCLIP++ (rec., LP) | failed |" in (scene / "out" / "REPORT.md").read_text()


def test_ctrl_c(scene, reproduce, capsys, monkeypatch):
    def interrupt(self, function, argument, output):
        raise KeyboardInterrupt

    monkeypatch.setattr(SameProcess, "call", interrupt)
    with pytest.raises(SystemExit) as stop:
        reproduce("--seeds", "0")
    assert stop.value.code == 130 and capsys.readouterr().err == "\ninterrupted: repeat the command to resume\n"


def test_conditions_that_the_suite_does_not_have(scene, reproduce, capsys):
    assert "--conditions 'moon': choose from config" in mistake(capsys, reproduce, "--conditions", "moon")


def test_a_clip_is_pretrained_once_and_a_file_of_another_is_refused(tmp_path, monkeypatch):
    made = []

    def pretrain(out, world, seed):
        made.append((world.name, seed))
        save_safetensors({"weight": torch.zeros(1)}, out, {"world": world.name, "seed": str(seed)})
        return {"seconds": 3.0}

    monkeypatch.setattr(program.tool("pretrain_embedded_clip"), "pretrain", pretrain)
    file = tmp_path / "clips" / "embedded_longtail-seed1.safetensors"

    def job(world="embedded_longtail", seed=1):
        options = ("WORLD", world, "SEED", seed, "FILE", str(file), "OUTPUT_DIR", str(tmp_path / "run"))
        return program.Job("pretrain", (), options)

    first, second = program.perform(job()), program.perform(job())
    assert made == [("embedded_longtail", 1)] and file.exists()
    assert (first["reused"], second["reused"]) == (False, True) and first["training"]["seconds"] == 3.0
    assert (second["world"], second["clip_seed"], second["training"]) == ("embedded_longtail", 1, None)
    for other in (job(seed=2), job(world="embedded")):
        with pytest.raises(program.ReclipError, match="seed1.safetensors is not the CLIP of world .*: remove it"):
            program.perform(other)
    with pytest.raises(program.ReclipError, match="only the worlds embedded, embedded_longtail have a CLIP"):
        program.perform(job(world="voc20"))
