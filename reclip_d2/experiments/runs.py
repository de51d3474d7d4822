"""The runs of a suite in a folder: their configs, what is done of them, what is to be done.

A run is done once. What it was begun with is remembered, and it is not gone on with under another config.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.data.classes import check_labelled
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.plan import Run, plan_runs, teacher_of
from reclip_d2.experiments.resolve import checkpoint_options, experiment_options, resolve, settings_of
from reclip_d2.experiments.run_folder import RunFolder
from reclip_d2.experiments.suite import Suite
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.utils.locks import LOCK_NAME, exclusive


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, as it can be sent to another process."""

    kind: str
    """``evaluate``, ``train`` or ``probe``."""
    config_file: str
    options: tuple[Any, ...]
    """``KEY value`` pairs, ``OUTPUT_DIR`` and ``SEED`` among them."""

    @property
    def folder(self) -> Path:
        """``OUTPUT_DIR``."""
        return Path(self.options[self.options.index("OUTPUT_DIR") + 1])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says of all runs."""

    out: Path
    seeds: tuple[int, ...]
    device: str
    dataset: str = ""
    """Where to evaluate; "" for the configs' own."""
    options: tuple[str, ...] = ()
    """``KEY VALUE`` overrides of all runs."""
    only: tuple[str, ...] = ()
    """Experiments to run; empty for all."""


@dataclasses.dataclass
class Planned:
    """A run with all that is known of it before it begins."""

    run: Run
    folder: RunFolder
    cfg: CfgNode
    job: Job
    overrides: dict[str, Any]
    """Of the experiment, beside those of all runs."""
    settings: dict[str, Any]
    teacher: Planned | None

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.name

    @property
    def fingerprint(self) -> str:
        """Hash of the settings."""
        return self.folder.fingerprint(self.settings)


class Runs:
    """The runs of a suite in a folder, planned in order.

    Raises:
        ReclipError: a config is wrong.
    """

    def __init__(self, suite: Suite, settings: Settings) -> None:
        self.suite = suite
        self.settings = settings
        by_run: dict[Run, Planned] = {}
        for run in plan_runs(suite, settings.seeds):
            # Of an experiment without seeds the seed is the first: it decides nothing.
            seed = settings.seeds[0] if run.seed is None else run.seed
            teacher = teacher_of(suite, run, seed)
            by_run[run] = self._plan(run, seed, by_run[teacher] if teacher else None)
        self.planned: list[Planned] = list(by_run.values())

    @property
    def selected(self) -> list[Planned]:
        """The runs that are wanted, with what they need."""
        if not self.settings.only:
            return self.planned
        keys = self.suite.needed(list(self.settings.only))
        return [planned for planned in self.planned if planned.run.experiment.key in keys]

    def _plan(self, run: Run, seed: int, teacher: Planned | None) -> Planned:
        folder, experiment = RunFolder((self.settings.out / "runs" / run.name).absolute()), run.experiment
        # Seeds that decide nothing are all the same: the result is that of every seed.
        options: list[Any] = ["SEED", seed if run.seed is not None else 0, "MODEL.DEVICE", self.settings.device]
        if self.settings.dataset:
            options += ["DATASETS.TEST", (self.settings.dataset,)]
        options += self.settings.options
        # MaskCLIP has no checkpoint.
        checkpoint = teacher.folder.checkpoint if teacher and teacher.run.experiment.kind == "train" else None
        options += checkpoint_options(experiment, checkpoint)
        options += ["OUTPUT_DIR", str(folder.path)]
        cfg = resolve(self.suite, experiment, options)
        settings = settings_of(cfg, experiment.kind, teacher.fingerprint if teacher else "")
        overrides = experiment_options(self.suite, experiment)
        job = Job(
            experiment.kind,
            str(self.suite.config_file(experiment.config)),
            tuple([*(part for item in overrides.items() for part in item), *options]),
        )
        return Planned(run, folder, cfg, job, overrides, settings, teacher)

    # ---- what is to be done ---------------------------------------------------------------------------------

    def check_changes(self, overwrite: bool) -> None:
        """Refuse runs that were made with other settings than they would be made with now, or remove them.

        A student of a removed teacher is made anew, too: its teacher is among its settings.

        Raises:
            ReclipError: there are such runs, and ``overwrite`` is False.
        """
        changed = [(p, changes) for p in self.selected if (changes := p.folder.changes(p.settings))]
        if not changed:
            return
        if not overwrite:
            planned, changes = changed[0]
            more = f" (and {len(changes) - 1} more keys)" if len(changes) > 1 else ""
            others = f"; {len(changed) - 1} other runs differ, too" if len(changed) > 1 else ""
            raise ReclipError(
                f"run {planned.name} in {self.settings.out} was made with another config: {changes[0]}{more}{others};"
                " give --overwrite to run again what differs, or another --out"
            )
        for planned, _ in changed:
            planned.folder.clear()

    def check_datasets(self) -> None:
        """Look at the data sets before any run does, and once: those made on first use are made here.

        Raises:
            ReclipError: one is missing, or there are no labels to evaluate with.
        """
        pending = self.pending()
        for name in dict.fromkeys(name for planned in pending for name in planned.cfg.DATASETS.TEST):
            check_labelled(name)
        unlabelled = dict.fromkeys(
            tuple(p.cfg.DATASETS.TRAIN) for p in pending if p.run.experiment.kind in ("train", "hypotheses")
        )
        for names in unlabelled:
            unlabelled_records(names)

    def pending(self) -> list[Planned]:
        """Runs without a result, and those whose checkpoint is gone and wanted by one without a result."""
        wanted: set[str] = set()
        for planned in reversed(self.selected):
            if planned.folder.result is None:
                wanted.add(planned.name)
            teacher = planned.teacher
            lacks = teacher is not None and teacher.run.experiment.kind == "train"
            if planned.name in wanted and lacks and not teacher.folder.checkpoint.exists():
                wanted.add(teacher.name)
        return [planned for planned in self.planned if planned.name in wanted]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second program out of the folder; the lock goes with the process, however that ends."""
        out = self.settings.out
        with exclusive(out / LOCK_NAME, f"another reproduce.py works in {out}: wait for it, or name another --out"):
            yield
