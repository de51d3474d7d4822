"""A suite as data: experiments, and the tables that they fill. ``suite_file`` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("evaluate", "train", "probe", "hypotheses")
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
"""Those whose result is a mapping with its ``score``."""
DIGITS = {metric: 3 for metric in METRICS} | {"mIoU": 1, "classes_in_hypothesis": 2, "classes_per_image": 2}
PAPER_DIGITS = {metric: 2 for metric in METRICS} | {"mIoU": 1}


@dataclass(frozen=True, eq=False)
class Experiment:
    """One model: a config file with overrides. A suite has one object of each, by which they are told apart."""

    key: str
    title: str
    kind: str
    """``evaluate`` (nothing to train), ``train``, ``probe`` (linear probing of the teacher, with labels), or
    ``hypotheses`` (those of the training images, compared with their labels)."""
    config: str
    """File in the suite's config folder."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Config keys and their values, of the kind that the key has."""
    take: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Config files of the same folder, and the keys whose values are taken from them."""
    teacher: str = ""
    """Experiment whose checkpoint this one needs: it teaches (``train``) or is probed (``probe``)."""
    seeded: bool = True
    """Whether the result depends on the seed; else it is run once."""
    group: str = "paper"
    """``paper``, ``control`` or ``ours``."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    experiment: str
    title: str
    paper: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """The paper's numbers by metric and data set; None for one that the paper has and we could not read."""


@dataclass(frozen=True)
class Claim:
    """An ordering of two experiments."""

    better: str
    worse: str
    metric: str
    source: str
    """Where it is claimed; ``ours`` for what we ask beside the papers."""
    explanation: str = ""
    """Why it may not hold, shown only where it does not; ``{...}`` are filled in from the measurements."""


@dataclass(frozen=True)
class Curve:
    """A row of a table drawn against a config key."""

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
class Table:
    """A table or figure of the papers, or one of our own."""

    key: str
    title: str
    text: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    curves: tuple[Curve, ...] = ()
    chart: bool = False
    main: bool = False
    """Its runs come first, over all seeds."""

    @property
    def short_title(self) -> str:
        """``Table II`` of ``Table II: comparison``."""
        return self.title.partition(":")[0]


@dataclass(frozen=True)
class Suite:
    """All runs and tables of one data set."""

    name: str
    file: Path
    configs: Path
    """Folder of the config files."""
    paper_columns: tuple[str, ...]
    """Data sets of the paper whose numbers stand beside ours."""
    text: str
    """What a reader must know of this data set."""
    common: Mapping[str, Any]
    """Overrides of all experiments."""
    experiments: Mapping[str, Experiment]
    tables: tuple[Table, ...]

    def config_file(self, name: str) -> Path:
        """Path of a config file."""
        return self.configs / name

    def needed(self, keys: list[str]) -> list[str]:
        """Experiments and, before each, what it depends on; in the order of ``keys``, each once."""
        found: dict[str, None] = {}
        for key in keys:
            chain = [key]
            while teacher := self.experiments[chain[-1]].teacher:
                chain.append(teacher)
            found.update(dict.fromkeys(reversed(chain)))
        return list(found)
