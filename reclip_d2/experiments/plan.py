"""The runs of a suite in a folder: their configs, and which are finished or pending.

Each run is done once, in a folder that records its settings; it does not resume with other settings.

::

    DIR/runs/<experiment>[-seedN]/
        settings.json   everything that the result depends on, written before the run begins
        result.json     written when it is done: metrics, overrides, durations, versions
        failure.txt     why it failed, until the next attempt
        log.txt, output.txt, metrics.json, model_final.pth, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.config import flatten, load_config
from reclip_d2.data.classes import check_labelled
from reclip_d2.engine.output_dir import remove_intermediate_checkpoints
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.suite import Experiment, Suite, value_of
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.modeling.checkpoint import FINAL_CHECKPOINT
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MissingFileError, read_json
from reclip_d2.utils.locks import LOCK_NAME, exclusive

_CHECKPOINTS = ("MODEL.TEACHER.WEIGHTS", "LINEAR_PROBE.WEIGHTS")
MADE_WITH = "teacher"
"""Entry of a run's settings: fingerprint of the run whose checkpoint it uses."""


def experiment_options(suite: Suite, experiment: Experiment) -> dict[str, Any]:
    """``{KEY: value}`` overrides of an experiment: the suite's, those taken from other configs, and the
    experiment's."""
    options = dict(suite.common)
    for name, keys in experiment.take.items():
        cfg = load_config(suite.config_files(name))
        options.update({key: value_of(cfg, key) for key in keys})
    return {**options, **experiment.overrides}


def resolve(suite: Suite, experiment: Experiment, options: Sequence[Any] = ()) -> CfgNode:
    """Config of an experiment.

    Args:
        options: further ``KEY value`` pairs, which override the others.

    Raises:
        ReclipError: a config file or key is wrong; the message names the experiment.
    """
    own = [part for item in experiment_options(suite, experiment).items() for part in item]
    try:
        return load_config(suite.config_files(experiment.config), [*own, *options])
    except ReclipError as error:
        raise ReclipError(f"experiment {experiment.key} of suite {suite.name}: {error}") from error


def run_settings(cfg: CfgNode, kind: str, teacher_fingerprint: str) -> dict[str, Any]:
    """Everything that a run's result depends on, flat and JSON-serialisable: config values by key, kind, teacher's run.

    Args:
        teacher_fingerprint: fingerprint of the run whose checkpoint this one uses, in place of the checkpoint's path;
            "" for none.
    """
    left_out = ("OUTPUT_DIR", *(_CHECKPOINTS if teacher_fingerprint else ()))
    flat = {key: value for key, value in flatten(cfg).items() if key not in left_out}
    return json.loads(json.dumps({**flat, "kind": kind, MADE_WITH: teacher_fingerprint}))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Short hash of a run's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between the settings that a run was made with and the current ones.

    Keys added to the project since then count as unchanged at their defaults; keys removed since then are ignored.
    """
    defaults: dict[str, Any] | None = None
    found = []
    for key, value in now.items():
        if key in before:
            then = before[key]
        else:
            defaults = defaults or json.loads(json.dumps(flatten(load_config(""))))
            then = defaults.get(key)
        if then != value:
            found.append(f"{key} is {value!r} now and was {then!r}")
    return found


def checkpoint_options(experiment: Experiment, checkpoint: Path | None) -> list[Any]:
    """``KEY value`` that names the teacher's checkpoint, if there is one."""
    if checkpoint is None:
        return []
    return ["LINEAR_PROBE.WEIGHTS" if experiment.kind == "probe" else "MODEL.TEACHER.WEIGHTS", str(checkpoint)]


@dataclass(frozen=True)
class Run:
    """An experiment with a seed."""

    experiment: Experiment
    seed: int | None
    """None if the result does not depend on the seed."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.experiment.key if self.seed is None else f"{self.experiment.key}-seed{self.seed}"


def run_of(suite: Suite, key: str, seed: int) -> Run:
    """The run of an experiment for a seed."""
    experiment = suite.experiments[key]
    return Run(experiment, seed if experiment.seeded else None)


def teacher_of(suite: Suite, run: Run, seed: int) -> Run | None:
    """The run whose checkpoint a run needs: the teacher's of the same seed."""
    return run_of(suite, run.experiment.teacher, seed) if run.experiment.teacher else None


def plan_runs(suite: Suite, seeds: Sequence[int]) -> list[Run]:
    """Runs of the suite's tables, each after the one that it depends on.

    First the main table, seed by seed, then all other tables, seed by seed, so that an interrupted suite has a complete
    main table.
    """
    found: dict[Run, None] = {}
    main = [table for table in suite.tables if table.main]
    for tables in (main, suite.tables):
        keys = [row.experiment for table in tables for row in table.rows]
        keys += [key for table in tables for claim in table.claims for key in (claim.better, claim.worse)]
        for seed in seeds:
            found.update(dict.fromkeys(run_of(suite, key, seed) for key in suite.needed(keys)))
    return list(found)


PROBE_FOLDER = "linear_probe"


class ExperimentFolder:
    """Paths and recorded state of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / FINAL_CHECKPOINT
        self.failure_file = path / "failure.txt"
        self._settings = path / "settings.json"
        self._result = path / "result.json"

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings that the run was started with; None before that."""
        return self._read(self._settings)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result; None if the run is not done."""
        return self._read(self._result)

    @property
    def failure(self) -> str:
        """Why the run failed; "" if it did not."""
        try:
            return self.failure_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """Differences between the run's recorded settings and ``settings``."""
        begun = self.settings
        return [] if begun is None else differences(begun, settings)

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        """Hash of the settings, or of the recorded ones if they are equivalent."""
        begun = self.settings
        return fingerprint(settings if begun is None or differences(begun, settings) else begun)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Record the run's settings, and clear an earlier failure.

        Raises:
            ReclipError: there are checkpoints of unknown settings.
        """
        if self.settings is None:
            if self.checkpoint.exists() or any(self.path.glob("*.pth")):
                raise ReclipError(
                    f"{self.path} contains checkpoints of unknown origin: remove them, or name another --out"
                )
            self._write(self._settings, settings)
        self.failure_file.unlink(missing_ok=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, and remove intermediate checkpoints."""
        self._write(self._result, result)
        for folder in (self.path, self.path / PROBE_FOLDER):
            remove_intermediate_checkpoints(folder)

    def fail(self, message: str) -> None:
        """Record why the run failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.failure_file) as temporary:
            temporary.write_text(message + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Remove the run. It is renamed first, so that a partly removed folder does not count as a run."""
        if self.path.exists():
            removed = Path(tempfile.mkdtemp(prefix=f".removed-{self.path.name}-", dir=self.path.parent))
            self.path.rename(removed / self.path.name)
            shutil.rmtree(removed, ignore_errors=True)

    def drop_checkpoints(self) -> None:
        """Remove all weights, but keep the result."""
        for pattern in ("last_checkpoint", "*.pth"):  # the pointer first, so that it never dangles
            for file in self.path.rglob(pattern):
                file.unlink()

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            return read_json(file, {"type": "object"}, "run file", f"remove {self.path} to run it again")
        except MissingFileError:
            return None

    @staticmethod
    def _write(file: Path, content: Mapping[str, Any]) -> None:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, picklable for another process."""

    kind: str
    """``evaluate``, ``train`` or ``probe``."""
    config_files: tuple[str, ...]
    options: tuple[Any, ...]
    """``KEY value`` pairs, ``OUTPUT_DIR`` and ``SEED`` among them."""

    @property
    def folder(self) -> Path:
        """``OUTPUT_DIR``."""
        return Path(self.options[self.options.index("OUTPUT_DIR") + 1])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Command-line settings of all runs."""

    out: Path
    seeds: tuple[int, ...]
    device: str
    dataset: str = ""
    """Where to evaluate; "" for the configs' data set."""
    options: tuple[str, ...] = ()
    """``KEY VALUE`` overrides of all runs."""
    only: tuple[str, ...] = ()
    """Experiments to run; empty for all."""


@dataclasses.dataclass
class Planned:
    """A run, with everything that is known before it begins."""

    run: Run
    folder: ExperimentFolder
    cfg: CfgNode
    job: Job
    overrides: dict[str, Any]
    """Overrides of the experiment, without those common to all runs."""
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
            # Experiments without seeds use the first seed, which has no effect.
            seed = settings.seeds[0] if run.seed is None else run.seed
            teacher = teacher_of(suite, run, seed)
            by_run[run] = self._plan(run, seed, by_run[teacher] if teacher else None)
        self.planned: list[Planned] = list(by_run.values())

    @property
    def selected(self) -> list[Planned]:
        """The requested runs, and the runs that they need."""
        if not self.settings.only:
            return self.planned
        keys = self.suite.needed(list(self.settings.only))
        return [planned for planned in self.planned if planned.run.experiment.key in keys]

    def _plan(self, run: Run, seed: int, teacher: Planned | None) -> Planned:
        folder, experiment = ExperimentFolder((self.settings.out / "runs" / run.name).absolute()), run.experiment
        # If seeds have no effect, the result is valid for every seed.
        options: list[Any] = ["SEED", seed if run.seed is not None else 0, "MODEL.DEVICE", self.settings.device]
        if self.settings.dataset:
            options += ["DATASETS.TEST", (self.settings.dataset,)]
        options += self.settings.options
        # MaskCLIP has no checkpoint.
        checkpoint = teacher.folder.checkpoint if teacher and teacher.run.experiment.kind == "train" else None
        options += checkpoint_options(experiment, checkpoint)
        options += ["OUTPUT_DIR", str(folder.path)]
        cfg = resolve(self.suite, experiment, options)
        settings = run_settings(cfg, experiment.kind, teacher.fingerprint if teacher else "")
        overrides = experiment_options(self.suite, experiment)
        job = Job(
            experiment.kind,
            self.suite.config_files(experiment.config),
            tuple([*(part for item in overrides.items() for part in item), *options]),
        )
        return Planned(run, folder, cfg, job, overrides, settings, teacher)

    # ---- what is to be done ---------------------------------------------------------------------------------

    def check_changes(self, overwrite: bool) -> None:
        """Raise for runs that were made with other than the current settings, or remove them.

        The student of a removed teacher is run again too, since the teacher is one of its settings.

        Raises:
            ReclipError: there are such runs, and ``overwrite`` is False.
        """
        changed = [(p, changes) for p in self.selected if (changes := p.folder.changes(p.settings))]
        if not changed:
            return
        if not overwrite:
            planned, changes = changed[0]
            more = f" (and {len(changes) - 1} more keys)" if len(changes) > 1 else ""
            others = f"; {len(changed) - 1} other runs differ too" if len(changed) > 1 else ""
            raise ReclipError(
                f"run {planned.name} in {self.settings.out} was made with another config: {changes[0]}{more}{others};"
                " give --overwrite to repeat such runs, or another --out"
            )
        for planned, _ in changed:
            planned.folder.clear()

    def check_datasets(self) -> None:
        """Load the data sets once before any run: those made on first use are made here.

        Raises:
            ReclipError: a data set is missing, or has no labels to evaluate with.
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
        """Runs without a result, and those whose missing checkpoint is needed by a run without a result."""
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
        """Keep other programs out of the folder; the lock ends with the process in any case."""
        out = self.settings.out
        with exclusive(out / LOCK_NAME, f"another reproduce.py is using {out}: wait for it, or name another --out"):
            yield
