"""The runs of a suite in a folder: their configs, and which are finished or pending.

Each run is done once, in a folder that records its settings (:mod:`reclip_d2.experiments.run_folder`); it does not
resume with other settings. A suite of several data sets or CLIPs does every experiment on each, in subfolders
``DIR/runs/<data set>[-clipN]``; the CLIPs are in ``DIR/clips``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.config import flatten, load_config
from reclip_d2.data.classes import check_labelled
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.run_folder import ExperimentFolder, fingerprint
from reclip_d2.experiments.suite import PRETRAIN, Condition, Experiment, Suite, value_of
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.utils.locks import LOCK_NAME, exclusive

_CHECKPOINTS = ("MODEL.TEACHER.WEIGHTS", "LINEAR_PROBE.WEIGHTS")
_EVALUATED = "MODEL.WEIGHTS"
_CLIP = "MODEL.CLIP.PRETRAINED"
MADE_WITH = "teacher"
"""Entry of a run's settings: fingerprint of the run whose checkpoint it uses."""
MADE_ON = "clip"
"""Entry of a run's settings: fingerprint of the pretraining of its CLIP; missing for the CLIP of the config."""
PRETRAINING = Experiment("pretraining", "pretraining of another CLIP", PRETRAIN, config="", seeded=False)


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


def run_settings(cfg: CfgNode, kind: str, teacher_fingerprint: str, clip_fingerprint: str = "") -> dict[str, Any]:
    """Everything that a run's result depends on, flat and JSON-serialisable: config values by key, kind, the runs whose
    files it uses.

    Args:
        teacher_fingerprint: fingerprint of the run whose checkpoint this one uses, in place of the checkpoint's path;
            "" for none.
        clip_fingerprint: fingerprint of the pretraining of its CLIP, in place of that file's path; "" for the CLIP of
            the config.
    """
    checkpoints = (_EVALUATED,) if kind == "evaluate" else _CHECKPOINTS
    left_out = ("OUTPUT_DIR", *(checkpoints if teacher_fingerprint else ()), *((_CLIP,) if clip_fingerprint else ()))
    flat = {key: value for key, value in flatten(cfg).items() if key not in left_out}
    made_on = {MADE_ON: clip_fingerprint} if clip_fingerprint else {}
    return json.loads(json.dumps({**flat, "kind": kind, MADE_WITH: teacher_fingerprint, **made_on}))


def checkpoint_options(experiment: Experiment, checkpoint: Path | None) -> list[Any]:
    """``KEY value`` that names the teacher's checkpoint, if there is one."""
    if checkpoint is None:
        return []
    keys = {"probe": "LINEAR_PROBE.WEIGHTS", "evaluate": _EVALUATED}
    return [keys.get(experiment.kind, "MODEL.TEACHER.WEIGHTS"), str(checkpoint)]


@dataclass(frozen=True)
class Run:
    """An experiment with a seed, on a data set with a CLIP."""

    experiment: Experiment
    seed: int | None
    """None if the result does not depend on the seed."""
    condition: Condition

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        name = self.experiment.key if self.seed is None else f"{self.experiment.key}-seed{self.seed}"
        return f"{self.condition.key}/{name}" if self.condition.several else name


def run_of(suite: Suite, condition: Condition, key: str, seed: int) -> Run:
    """The run of an experiment for a seed."""
    experiment = suite.experiments[key]
    return Run(experiment, seed if experiment.seeded else None, condition)


def teacher_of(suite: Suite, run: Run, seed: int) -> Run | None:
    """The run whose checkpoint a run needs: the teacher's of the same seed."""
    teacher = run.experiment.teacher
    return run_of(suite, run.condition, teacher, seed) if teacher else None


def plan_runs(suite: Suite, seeds: Sequence[int]) -> list[Run]:
    """Runs of the suite's tables, each after the ones that it depends on.

    First the pretraining of CLIPs, then the main table, seed by seed, then all other tables, seed by seed, so that an
    interrupted suite has a complete main table.
    """
    found: dict[Run, None] = {}
    main = [table for table in suite.tables if table.main]
    for tables in (main, suite.tables):
        for seed in seeds:
            for condition in suite.conditions:
                shown = [table for table in tables if condition in suite.conditions_of(table)]
                keys = [row.experiment for table in shown for row in table.rows]
                keys += [key for table in shown for claim in table.claims for key in (claim.better, claim.worse)]
                found.update(dict.fromkeys(run_of(suite, condition, key, seed) for key in suite.needed(keys)))
    clips = dict.fromkeys(run.condition for run in found if run.condition.clip_seed)
    return [*(Run(PRETRAINING, None, condition) for condition in clips), *found]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, picklable for another process."""

    kind: str
    """See :class:`~reclip_d2.experiments.suite.Experiment`, or ``pretrain``."""
    config_files: tuple[str, ...]
    options: tuple[Any, ...]
    """``KEY value`` pairs, ``OUTPUT_DIR`` and ``SEED`` among them; of a pretraining also ``WORLD`` and ``FILE``."""
    masks: str = ""
    """Folder of a run of kind ``masks``."""
    match: str = ""
    """How its clusters are matched to classes."""

    @property
    def folder(self) -> Path:
        """``OUTPUT_DIR``."""
        return Path(self.value("OUTPUT_DIR"))

    def value(self, key: str) -> Any:  # noqa: ANN401
        """Value of a key in ``options``, where the last one counts."""
        return dict(zip(self.options[::2], self.options[1::2], strict=True))[key]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Command-line settings of all runs."""

    out: Path
    seeds: tuple[int, ...]
    device: str
    dataset: str = ""
    """Where to evaluate, with ``*`` for the name of the condition's data set; "" for the configs' data set."""
    options: tuple[str, ...] = ()
    """``KEY VALUE`` overrides of all runs."""
    only: tuple[str, ...] = ()
    """Experiments to run; empty for all."""
    masks: Path | None = None
    """Folder with other systems' masks, in ``<data set's config>/<experiment>``; None if there are none."""


@dataclasses.dataclass
class Planned:
    """A run, with everything that is known before it begins."""

    run: Run
    folder: ExperimentFolder
    cfg: CfgNode | None
    """None for a pretraining."""
    job: Job
    overrides: dict[str, Any]
    """Overrides of the experiment, without those common to all runs."""
    settings: dict[str, Any]
    teacher: Planned | None = None
    clip: Planned | None = None
    """Pretraining of its CLIP; None for the CLIP of the config."""

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.name

    @property
    def needs(self) -> list[Planned]:
        """Runs that must be done before."""
        return [needed for needed in (self.clip, self.teacher) if needed is not None]

    @property
    def product(self) -> Path | None:
        """File that other runs need: a checkpoint, or a CLIP."""
        if self.run.experiment.kind == PRETRAIN:
            return Path(self.job.value("FILE"))
        return self.folder.checkpoint if self.run.experiment.kind == "train" else None

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
        # What an experiment's runs with different seeds have in common: overrides, options and config.
        self._shared: dict[tuple[Experiment, Condition], tuple[dict[str, Any], list[Any], CfgNode]] = {}
        clips: dict[Condition, Planned] = {}
        by_run: dict[Run, Planned] = {}
        for run in plan_runs(suite, settings.seeds):
            if run.experiment is PRETRAINING:
                clips[run.condition] = self._plan_clip(run)
                continue
            if run.experiment.kind == "masks":
                if (masks := self._masks(run)) is not None:
                    by_run[run] = self._plan_masks(run, masks)
                continue
            # Experiments without seeds use the first seed, which has no effect.
            seed = settings.seeds[0] if run.seed is None else run.seed
            teacher = teacher_of(suite, run, seed)
            by_run[run] = self._plan(run, seed, by_run[teacher] if teacher else None, clips.get(run.condition))
        self.planned: list[Planned] = [*clips.values(), *by_run.values()]

    @property
    def selected(self) -> list[Planned]:
        """The requested runs, and the runs that they need."""
        if not self.settings.only:
            return self.planned
        keys = self.suite.needed(list(self.settings.only))
        chosen = [planned for planned in self.planned if planned.run.experiment.key in keys]
        names = {needed.name for planned in chosen for needed in (planned, *planned.needs)}
        return [planned for planned in self.planned if planned.name in names]

    def _folder(self, run: Run) -> ExperimentFolder:
        return ExperimentFolder((self.settings.out / "runs" / run.name).absolute())

    def _plan_clip(self, run: Run) -> Planned:
        folder, condition = self._folder(run), run.condition
        file = (self.settings.out / "clips" / f"{condition.world}-seed{condition.clip_seed}.safetensors").absolute()
        settings = {"kind": PRETRAIN, "WORLD": condition.world, "SEED": condition.clip_seed}
        options = ("WORLD", condition.world, "SEED", condition.clip_seed, "FILE", str(file))
        job = Job(PRETRAIN, (), (*options, "OUTPUT_DIR", str(folder.path)))
        return Planned(run, folder, None, job, {}, settings)

    def _masks(self, run: Run) -> Path | None:
        """The user's folder of masks for a run; None if there is none."""
        folder = self.settings.masks and self.settings.masks / run.condition.world / run.experiment.key
        return folder if folder and folder.is_dir() else None

    def _plan_masks(self, run: Run, masks: Path) -> Planned:
        folder, experiment = self._folder(run), run.experiment
        files = self.suite.on(run.condition).config_files(experiment.config)
        options: list[Any] = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder.path)]
        if self.settings.dataset:
            options += ["DATASETS.TEST", (self.settings.dataset.replace("*", run.condition.world),)]
        cfg = load_config(files, options)
        found = sorted((str(f.relative_to(masks)), f.stat().st_size, f.stat().st_mtime_ns) for f in masks.rglob("*.*"))
        settings = {
            "kind": experiment.kind,
            "DATASETS.TEST": list(cfg.DATASETS.TEST),
            "match": experiment.match,
            "files": fingerprint({"files": found}),
        }
        job = Job(experiment.kind, files, tuple(options), str(masks.absolute()), experiment.match)
        return Planned(run, folder, cfg, job, {}, settings)

    def _plan(self, run: Run, seed: int, teacher: Planned | None, clip: Planned | None) -> Planned:
        folder, experiment, suite = self._folder(run), run.experiment, self.suite.on(run.condition)
        if (experiment, run.condition) not in self._shared:
            shared: list[Any] = ["MODEL.DEVICE", self.settings.device]
            if self.settings.dataset:
                shared += ["DATASETS.TEST", (self.settings.dataset.replace("*", run.condition.world),)]
            if clip is not None:
                shared += [_CLIP, str(clip.product)]
            shared += self.settings.options
            overrides, cfg = experiment_options(suite, experiment), resolve(suite, experiment, shared)
            self._shared[experiment, run.condition] = overrides, shared, cfg
        overrides, shared, cfg = self._shared[experiment, run.condition]
        # If seeds have no effect, the result is valid for every seed. MaskCLIP has no checkpoint.
        own: list[Any] = ["SEED", seed if run.seed is not None else 0] if "SEED" not in shared[::2] else []
        own += [*checkpoint_options(experiment, teacher.product if teacher else None), "OUTPUT_DIR", str(folder.path)]
        cfg = cfg.clone()
        for key, value in zip(own[::2], own[1::2], strict=True):
            *nodes, leaf = key.split(".")
            functools.reduce(operator.getitem, nodes, cfg)[leaf] = value
        fingerprints = [needed.fingerprint if needed else "" for needed in (teacher, clip)]
        settings = run_settings(cfg, experiment.kind, *fingerprints)
        job = Job(
            experiment.kind,
            suite.config_files(experiment.config),
            tuple([*(part for item in overrides.items() for part in item), *shared, *own]),
        )
        return Planned(run, folder, cfg, job, overrides, settings, teacher, clip)

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
        pending = [planned for planned in self.pending() if planned.cfg is not None]
        for name in dict.fromkeys(name for planned in pending for name in planned.cfg.DATASETS.TEST):
            check_labelled(name)
        unlabelled = dict.fromkeys(
            tuple(p.cfg.DATASETS.TRAIN) for p in pending if p.run.experiment.kind in ("train", "hypotheses")
        )
        for names in unlabelled:
            unlabelled_records(names)

    def pending(self) -> list[Planned]:
        """Runs without a result, and those whose missing checkpoint or CLIP is needed by a run without a result."""
        wanted: set[str] = set()
        for planned in reversed(self.selected):
            if planned.folder.result is None:
                wanted.add(planned.name)
            if planned.name in wanted:
                lacking = [x for x in planned.needs if x.product is not None and not x.product.exists()]
                wanted.update(needed.name for needed in lacking)
        return [planned for planned in self.planned if planned.name in wanted]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other programs out of the folder; the lock ends with the process in any case."""
        out = self.settings.out
        with exclusive(out / LOCK_NAME, f"another reproduce.py is using {out}: wait for it, or name another --out"):
            yield
