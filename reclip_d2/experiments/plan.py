"""Which runs a suite takes, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reclip_d2.experiments.suite import Experiment, Suite


@dataclass(frozen=True)
class Run:
    """An experiment with a seed."""

    experiment: Experiment
    seed: int | None
    """None: the result depends on no seed."""

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

    First the main table, seed by seed, then all other tables, seed by seed: what was stopped half-way has a whole main
    table.
    """
    found: dict[Run, None] = {}
    main = [table for table in suite.tables if table.main]
    for tables in (main, suite.tables):
        keys = [row.experiment for table in tables for row in table.rows]
        keys += [key for table in tables for claim in table.claims for key in (claim.better, claim.worse)]
        for seed in seeds:
            found.update(dict.fromkeys(run_of(suite, key, seed) for key in suite.needed(keys)))
    return list(found)
