"""What holds on every data set and CLIP of a suite: the measurements of each, side by side."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from reclip_d2.experiments.measurements import (
    FAILS,
    HOLDS,
    MIXED,
    NOISE,
    UNKNOWN,
    Judged,
    Measurements,
    fill_in,
)
from reclip_d2.experiments.plan import Runs
from reclip_d2.experiments.suite import PRETRAIN, Claim, Condition, Suite, Table


@dataclasses.dataclass(frozen=True)
class JudgedAcross:
    """A claim with its verdict on each condition."""

    claim: Claim
    table: Table
    by_condition: Mapping[Condition, Judged]
    """The smallest difference first; conditions on which the claim was not measured are last."""
    explanation: str
    """"" where the claim holds, or has none."""

    @property
    def word(self) -> str:
        """The verdict over all conditions: see :func:`word_across`."""
        return word_across([judged.verdict.word for judged in self.by_condition.values()])

    @property
    def paper(self) -> dict[str, float]:
        """The paper's difference by data set."""
        return next(iter(self.by_condition.values())).paper


def word_across(words: list[str]) -> str:
    """One verdict for several conditions.

    It holds if it does so on every condition; it does not hold if it fails on one and holds on none; it is mixed if it
    holds on one and fails on another; otherwise it is within noise. Conditions on which it was not run do not count.
    """
    known = {word for word in words if word != UNKNOWN}
    if not known:
        return UNKNOWN
    if FAILS in known:
        return MIXED if HOLDS in known else FAILS
    return NOISE if NOISE in known else HOLDS


class AcrossConditions:
    """Measurements of a suite on each of its conditions.

    Attributes:
        suite: the suite.
        by_condition: measurements by condition; the data set with the lowest scores first, each with its CLIPs in the
            suite's order.
        pretrainings: results of the pretraining of CLIPs.
    """

    def __init__(
        self,
        suite: Suite,
        by_condition: Mapping[Condition, Measurements],
        pretrainings: list[dict[str, Any]] | None = None,
    ) -> None:
        self.suite = suite
        self.pretrainings = pretrainings or []
        worlds = list(dict.fromkeys(condition.dataset for condition in by_condition))
        levels = {world: _level([m for c, m in by_condition.items() if c.dataset == world]) for world in worlds}
        order = sorted(by_condition, key=lambda c: (levels[c.dataset], worlds.index(c.dataset), c.clip_seed))
        self.by_condition = {condition: by_condition[condition] for condition in order}

    @classmethod
    def of(cls, runs: Runs) -> AcrossConditions:
        """Read the finished runs in a folder, for the requested seeds."""
        found = {condition: Measurements.of(runs, condition) for condition in runs.suite.conditions}
        clips = [p.folder.result for p in runs.planned if p.run.experiment.kind == PRETRAIN]
        return cls(runs.suite, found, [result for result in clips if result is not None])

    @property
    def first(self) -> Measurements:
        """Measurements of the first condition in the order of the report."""
        return next(iter(self.by_condition.values()))

    def of_table(self, table: Table) -> dict[Condition, Measurements]:
        """The conditions with which a table's rows are run."""
        wanted = self.suite.conditions_of(table)
        return {condition: found for condition, found in self.by_condition.items() if condition in wanted}

    def all_results(self) -> list[dict[str, Any]]:
        """Results of all runs that are done, also of pretrainings."""
        return [*self.pretrainings, *(result for m in self.by_condition.values() for result in m.all_results())]

    def training_seconds(self, key: str) -> str:
        """Median seconds of an experiment's training, over all conditions; ``none`` without training."""
        trainings = [r["training"] for m in self.by_condition.values() for r in m.results[key].values()]
        if not trainings:
            return ""
        seconds = [t["seconds"] for t in trainings if t and not t["first_iteration"]]
        return f"{statistics.median(seconds):.0f}" if seconds else "resumed" if any(trainings) else "none"

    def judge(self, claim: Claim, table: Table) -> JudgedAcross:
        """Verdicts on a claim, with the explanation unless it holds everywhere."""
        found = {condition: m.judge(claim, table) for condition, m in self.of_table(table).items()}

        def smallest_first(condition: Condition) -> float:
            difference = found[condition].verdict.difference
            return float("inf") if difference is None else difference.mean

        judged = JudgedAcross(claim, table, {c: found[c] for c in sorted(found, key=smallest_first)}, "")
        explain = judged.word not in (HOLDS, UNKNOWN)
        return dataclasses.replace(judged, explanation=self.fill_in(claim.explanation) if explain else "")

    def judge_all(self) -> list[JudgedAcross]:
        """All claims in the order of the tables."""
        return [self.judge(claim, table) for table in self.suite.tables for claim in table.claims]

    def fill_in(self, text: str) -> str:
        """A text with its ``{...}`` filled in by the numbers of each data set with the CLIP of its config, in order,
        separated by slashes; see :func:`~reclip_d2.experiments.measurements.fill_in`."""
        return fill_in(text, [m for c, m in self.by_condition.items() if c.clip_seed == 0])


def _level(found: list[Measurements]) -> float:
    """Mean score in the first metric of the main tables."""
    means = [
        m.mean(row.experiment, table.metrics[0])
        for m in found
        for table in m.suite.tables
        if table.main
        for row in table.rows
    ]
    known = [mean for mean in means if mean is not None]
    return statistics.mean(known) if known else 0.0
