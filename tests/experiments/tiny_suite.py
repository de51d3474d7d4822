"""A small suite file and made-up results, for tests without real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reclip_d2.experiments.plan import Job, Runs, Settings
from reclip_d2.experiments.suite import Suite
from reclip_d2.experiments.suite_file import load_suite

SUITE = """
suites:
  small: {dataset: configs/data.yaml, paper: [VOC], text: A small world.}
  other: {dataset: configs/data.yaml}
  worlds: {dataset: [configs/data.yaml, configs/hard.yaml], clip_seeds: [0, 1], seconds: {model.yaml: 30, plain: 6}}
methods: configs
common: {TEST.BIAS.BIN_WIDTH: 8}
experiments:
  plain: {title: Plain, kind: evaluate, config: plain.yaml, seeded: false}
  model: {title: Model, kind: train, config: model.yaml}
  added:
    {title: Added, kind: train, config: model.yaml, overrides: {MODEL.BIAS_HEAD.RECTIFICATION: add}, group: control}
  student: {title: Student, kind: train, config: student.yaml, teacher: model, suites: [small], group: ours}
  taken: {title: Taken, kind: train, config: model.yaml, take: {student.yaml: [SOLVER.BASE_LR]}}
  probe: {title: Probe, kind: probe, teacher: model, overrides: {LINEAR_PROBE.MAX_ITER: {small: 7, default: 9}}}
sweeps:
  sweep:
    {title: a key, base: model, key: HYPOTHESIS.THRESHOLD, symbol: t, values: {small: [0.1, 0.3], default: [0.2, 0.5]}}
tables:
  extra:
    title: "Extra: students"
    rows: [{experiment: student}, {experiment: probe}]
    claims: [{better: student, worse: model, source: ours}]
  main:
    title: "Main: models"
    main: true
    chart: true
    rows:
      - {experiment: plain, paper: {VOC: 10.0}}
      - {experiment: model, paper: {VOC: 12.5}}
      - {experiment: added, title: Model with +, paper: {VOC: ~}}
    claims:
      - {better: model, worse: plain, source: Table 1}
      - better: model
        worse: added
        source: Table 2
        explanation: "Plain has {plain}, the model {model}, {model - plain} more, loss {model: total_loss}."
  curve:
    title: "Curve: t"
    curves: [{sweep: sweep, label: points, line: added, line_title: the line}]
    claims:
      - {better: sweep.first, worse: sweep.last, source: Fig. 1}
      - {better: sweep.each, worse: added, source: Fig. 2}
"""
CONFIGS = {
    "data": "DATASETS: {TRAIN: [embedded_train], TEST: [embedded_val]}\nSOLVER: {CHECKPOINT_PERIOD: 7}\n",
    "hard": "_BASE_: data.yaml\n",
    "plain": "MODEL: {META_ARCHITECTURE: MaskCLIP}\n",
    "model": "MODEL: {META_ARCHITECTURE: RectifiedCLIP}\nHYPOTHESIS: {THRESHOLD: 0.2}\n",
    "student": "_BASE_: model.yaml\nMODEL: {META_ARCHITECTURE: Distillation}\nSOLVER: {BASE_LR: 0.125}\n",
}


def write_suite(folder: Path, text: str = SUITE) -> Path:
    """The suite file with its configs."""
    (folder / "configs").mkdir(exist_ok=True)
    for name, content in CONFIGS.items():
        (folder / "configs" / f"{name}.yaml").write_text(content)
    file = folder / "suite.yaml"
    file.write_text(text)
    return file


def small_suite(folder: Path, tables: list[str] | None = None, suite: str = "small") -> Suite:
    return load_suite(write_suite(folder), suite, tables)


def make_runs(folder: Path, seeds: tuple[int, ...] = (0, 1), **settings: Any) -> Runs:
    """The runs of the small suite in ``folder/out``."""
    chosen = small_suite(folder, settings.pop("tables", None), settings.pop("suite", "small"))
    return Runs(chosen, Settings(folder / "out", seeds, "cpu", **settings))


def made_up_result(miou: float, loss: float | None = None) -> dict[str, Any]:
    training = None if loss is None else {"iterations": 5, "first_iteration": 0, "seconds": 4.0, "total_loss": loss}
    return {
        "dataset": "embedded_val",
        "protocol": "made up",
        "supervision": "none",
        "metrics": {"mIoU": miou, "IoU": {}, "class_preference": {"score": miou / 100}},
        "training": training,
        "versions": {"Python": "3"},
        "machine": "a machine",
    }


class Worker:
    """Stands in for the real runs: remembers the jobs, leaves a checkpoint, and gives made-up results."""

    def __init__(self, scores: dict[str, float] | None = None, out: Path | None = None) -> None:
        """
        Args:
            out: output folder of a suite with several conditions, whose names of runs begin with the condition.
        """
        self.scores = scores or {}
        self.root = None if out is None else out / "runs"
        self.done: list[str] = []

    def __call__(self, job: Job, output: Path) -> dict[str, Any]:
        name = job.folder.name if self.root is None else str(job.folder.relative_to(self.root))
        self.done.append(name)
        if job.kind == "pretrain":
            Path(job.value("FILE")).parent.mkdir(parents=True, exist_ok=True)
            Path(job.value("FILE")).write_text("a CLIP")
            clip = {"world": job.value("WORLD"), "clip_seed": job.value("SEED"), "reused": False}
            return {**made_up_result(0.0), "dataset": "", "protocol": "", "metrics": {}, **clip}
        if job.kind == "train":
            (job.folder / "model_final.pth").write_text("weights")
            (job.folder / "last_checkpoint").write_text("model_final.pth")
        return made_up_result(self.scores.get(name, 50.0), loss=None if job.kind == "evaluate" else 0.5)
