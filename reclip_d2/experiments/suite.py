"""A suite: experiments, the tables that they fill, and the data sets and CLIPs that they are run with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from reclip_d2.errors import ReclipError

KINDS = ("evaluate", "train", "probe", "hypotheses", "true_shares", "masks")
PRETRAIN = "pretrain"
"""Kind of the runs that make another CLIP; a suite file lists none of them."""
GROUPS = ("paper", "control", "ours")
METRICS = {
    "mIoU": "mIoU (%)",
    "class_preference": "class-preference score",
    "space_preference": "space-preference score",
    "total_loss": "training loss at the end",
    "precision": "precision",
    "recall": "recall",
    "classes_in_hypothesis": "classes in a hypothesis",
    "classes_per_image": "classes in an image",
}
"""What is measured, and its heading."""
SCORES = ("class_preference", "space_preference")
"""Metrics whose result is a mapping with a ``score``."""
DIGITS = {metric: 3 for metric in METRICS} | {"mIoU": 1, "classes_in_hypothesis": 2, "classes_per_image": 2}
PAPER_DIGITS = {metric: 2 for metric in METRICS} | {"mIoU": 1}


@dataclass(frozen=True, eq=False)
class Experiment:
    """One model: a method's config file with overrides. A suite has one object per experiment, so they compare by
    identity."""

    key: str
    title: str
    kind: str
    """``evaluate`` (nothing to train; with a teacher, its checkpoint with other overrides), ``train``, ``probe``
    (linear probing of the teacher, with labels), ``hypotheses`` (those of the training images, compared with their
    labels), ``true_shares`` (MaskCLIP, calibrated to the class shares in the training images' labels), or ``masks`` (a
    folder of another system's masks)."""
    config: str
    """File in the suite's folder of methods; "" for ``masks``."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Config keys and their values, of the key's type."""
    take: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Config files of the same folder, and the keys whose values are taken from them."""
    teacher: str = ""
    """Experiment whose checkpoint this one needs: it teaches (``train``), is probed (``probe``) or evaluated
    (``evaluate``)."""
    seeded: bool = True
    """Whether the result depends on the seed; otherwise it is run once."""
    group: str = "paper"
    """``paper``, ``control`` or ``ours``."""
    match: str = ""
    """Of ``masks``: how clusters are matched to classes by the labels; "" if pixels are classes."""

    @property
    def inherits(self) -> bool:
        """Whether its config is its teacher's."""
        return self.kind == "probe" or (self.kind == "evaluate" and bool(self.teacher))


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    experiment: str
    title: str
    paper: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """The paper's numbers by metric and data set; None for illegible numbers."""
    source: str = ""
    """Where the numbers are from and how they were measured, if not from the papers of this suite."""


@dataclass(frozen=True)
class Claim:
    """An ordering of two experiments."""

    better: str
    worse: str
    metric: str
    source: str
    """Source of the claim; ``ours`` for orderings that are not in the papers."""
    explanation: str = ""
    """Why it may not hold, shown only if it does not; ``{...}`` are filled in from the measurements."""


@dataclass(frozen=True)
class Curve:
    """A row of a table, plotted against a config key."""

    title: str
    key: str
    symbol: str
    points: tuple[str, ...]
    """Experiments, in the order of the key's values."""
    label: str = ""
    line: str = ""
    """Experiment drawn as a horizontal line."""
    line_title: str = ""


@dataclass(frozen=True)
class Grid:
    """A two-way table: one line an experiment, one column a variant of it."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    """Title and experiments, as many as columns; "" where there is none."""


@dataclass(frozen=True)
class Table:
    """A table or figure, from the papers or not."""

    key: str
    title: str
    text: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    curves: tuple[Curve, ...] = ()
    chart: bool = False
    main: bool = False
    """Its runs come first, over all seeds, and are done with every CLIP; those of other tables with the first."""
    grid: Grid | None = None
    """How the report shows the rows, in place of a line each."""

    @property
    def short_title(self) -> str:
        """``Table II`` of ``Table II: comparison``."""
        return self.title.partition(":")[0]


@dataclass(frozen=True)
class Condition:
    """A data set and the CLIP that is used on it."""

    dataset: Path
    """Config file of the data set."""
    clip_seed: int = 0
    """0 for the CLIP of the data set's config; others are pretrained for the suite from this seed."""
    several: bool = False
    """Whether the suite has other conditions as well."""

    @property
    def world(self) -> str:
        """Name of the data set's config file, for the embedded data sets the world's."""
        return self.dataset.stem

    @property
    def key(self) -> str:
        """Short name, such as ``embedded`` or ``embedded-clip1``."""
        return f"{self.world}-clip{self.clip_seed}" if self.clip_seed else self.world

    @property
    def title(self) -> str:
        """The key in words."""
        return f"`{self.world}`, CLIP {self.clip_seed}" if self.clip_seed else f"`{self.world}`"


@dataclass(frozen=True)
class Suite:
    """All runs and tables of one or more data sets."""

    name: str
    file: Path
    conditions: tuple[Condition, ...]
    """The data sets, each with every CLIP."""
    methods: Path
    """Folder of the methods' config files."""
    paper_columns: tuple[str, ...]
    """The paper's data sets whose numbers are shown next to the measured ones."""
    text: str
    """Note on this data set for the report."""
    common: Mapping[str, Any]
    """Overrides of all experiments."""
    experiments: Mapping[str, Experiment]
    tables: tuple[Table, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Measured seconds of a run, by config file, kind or experiment; for the first estimate of the time."""

    @property
    def dataset(self) -> Path:
        """Config file of the first condition's data set."""
        return self.conditions[0].dataset

    def on(self, condition: Condition) -> Suite:
        """The suite on one condition only."""
        return dataclasses.replace(self, conditions=(condition,))

    def conditions_of(self, table: Table) -> list[Condition]:
        """The conditions with which the rows of a table are run."""
        return [condition for condition in self.conditions if table.main or condition.clip_seed == 0]

    def config_files(self, method: str) -> tuple[str, ...]:
        """Config files of a method's file on the data set, in the order in which they are merged; the data set's alone
        for the method ""."""
        return (str(self.dataset), str(self.methods / method)) if method else (str(self.dataset),)

    def needed(self, keys: list[str]) -> list[str]:
        """Experiments, each after those it depends on; in the order of ``keys``, without repetition."""
        found: dict[str, None] = {}
        for key in keys:
            chain = [key]
            while teacher := self.experiments[chain[-1]].teacher:
                chain.append(teacher)
            found.update(dict.fromkeys(reversed(chain)))
        return list(found)


def value_of(cfg: CfgNode, key: str) -> Any:  # noqa: ANN401
    """Value of ``A.B.C``.

    Raises:
        ReclipError: there is no such key.
    """
    for part in key.split("."):
        if not isinstance(cfg, CfgNode) or part not in cfg:
            raise ReclipError(f"there is no config key {key}: see reclip_d2/config/keys.py")
        cfg = cfg[part]
    return cfg
