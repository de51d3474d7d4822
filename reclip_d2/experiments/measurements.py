"""Measurements from a suite's finished runs: scores by seed, paired differences, verdicts on the claimed orderings."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from reclip_d2.experiments.plan import Runs
from reclip_d2.experiments.suite import DIGITS, METRICS, PRETRAIN, SCORES, Claim, Condition, Suite, Table

CONFIDENCE = 0.95
HOLDS, FAILS, NOISE, UNKNOWN = "holds", "does not hold", "within noise", "not run"
MIXED = "mixed"
"""Over several data sets or CLIPs: holds on one, and does not on another."""

Scores = Mapping[int | None, float]
"""A row's scores by seed; ``{None: score}`` for a row that does not depend on the seed."""


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± sample standard deviation``; only the mean if all seeds agree (no training, no seed)."""
    mean = statistics.mean(values)
    if len(values) < 2 or max(values) == min(values):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


class Difference(NamedTuple):
    """Paired difference of two rows over their common seeds."""

    mean: float
    half_width: float
    """Half the confidence interval of the mean; 0 for two rows without seeds, infinite for a single seed."""
    seeds: int
    """Number of seeds; 0 for two rows without seeds."""


class Verdict(NamedTuple):
    """The verdict on a claimed ordering."""

    word: str
    difference: Difference | None


def paired_difference(better: Scores, worse: Scores) -> Difference | None:
    """``better - worse`` per seed. A row without seeds is compared with every seed of the other.

    Returns:
        None if no seed was run with both.
    """
    seeds = [None] if None in better and None in worse else sorted({*better, *worse} - {None})
    pairs = [(better.get(seed, better.get(None)), worse.get(seed, worse.get(None))) for seed in seeds]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    if not values:
        return None
    mean = statistics.mean(values)
    if seeds == [None]:
        return Difference(mean, 0.0, 0)
    if len(values) < 2:
        return Difference(mean, math.inf, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean, student_t_quantile(len(values) - 1) * error, len(values))


def judge(better: Scores, worse: Scores) -> Verdict:
    """Whether ``better`` is above ``worse``.

    It holds, or does not, if the 95 % confidence interval of the mean paired difference (Student's t, one degree of
    freedom fewer than seeds) excludes 0; otherwise the difference is within noise. Two rows without seeds are judged by
    the sign. A single seed gives no estimate of the noise: within noise.
    """
    difference = paired_difference(better, worse)
    if difference is None:
        return Verdict(UNKNOWN, None)
    if difference.mean == 0 or abs(difference.mean) <= difference.half_width:
        return Verdict(NOISE, difference)
    return Verdict(HOLDS if difference.mean > 0 else FAILS, difference)


def student_t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """t with ``P(|T| <= t) = confidence`` for Student's t of ``degrees`` degrees of freedom (at least 1)."""
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


class Judged(NamedTuple):
    """A claim with its verdict."""

    claim: Claim
    table: Table
    verdict: Verdict
    paper: dict[str, float]
    """The paper's difference by data set."""


class Measurements:
    """Results of a suite's experiments by seed."""

    def __init__(self, suite: Suite, results: Mapping[str, Mapping[int | None, dict[str, Any]]], seeds: Sequence[int]):
        """
        Args:
            results: results of each experiment by seed (None without seeds); missing if a run is not done.
            seeds: the requested seeds.
        """
        self.suite = suite
        self.results = results
        self.seeds = tuple(seeds)
        self.failed: set[str] = set()
        """Experiments that failed for some seed."""
        self.stale: list[str] = []
        """Runs that were made with another config than the suite's; they do not count."""

    @classmethod
    def of(cls, runs: Runs, condition: Condition) -> Measurements:
        """Read the finished runs in a folder on one condition, for the requested seeds."""
        results: dict[str, dict[int | None, dict[str, Any]]] = {key: {} for key in runs.suite.experiments}
        measurements = cls(runs.suite.on(condition), results, runs.settings.seeds)
        for planned in runs.planned:
            if planned.run.condition != condition or planned.run.experiment.kind == PRETRAIN:
                continue
            key, result = planned.run.experiment.key, planned.folder.result
            if result is None:
                measurements.failed |= {key} if planned.folder.failure else set()
            elif planned.folder.changes(planned.settings):
                measurements.stale.append(planned.name)
            else:
                results[key][planned.run.seed] = result
        return measurements

    # ---- numbers --------------------------------------------------------------------------------------------

    def scores(self, key: str, metric: str = "mIoU") -> Scores:
        """Scores of an experiment by seed; those that were not measured are omitted."""
        values = {seed: _value(result, metric) for seed, result in self.results[key].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, key: str, metric: str = "mIoU") -> float | None:
        """Mean over the seeds; None if there is nothing."""
        values = list(self.scores(key, metric).values())
        return statistics.mean(values) if values else None

    def cell(self, key: str, metric: str = "mIoU") -> str:
        """``mean ± standard deviation``, or why there is no number."""
        scores = self.scores(key, metric)
        if not scores:
            return "failed" if key in self.failed else "none" if self.results[key] else "not run"
        text = spread(list(scores.values()), DIGITS[metric])
        missing = None not in scores and len(scores) < len(self.seeds)
        return f"{text} ({len(scores)} of {len(self.seeds)} seeds)" if missing else text

    def all_results(self) -> list[dict[str, Any]]:
        """Results of all runs that are done."""
        return [result for results in self.results.values() for result in results.values()]

    # ---- claims ---------------------------------------------------------------------------------------------

    def judge(self, claim: Claim, table: Table) -> Judged:
        """Verdict on a claim."""
        verdict = judge(self.scores(claim.better, claim.metric), self.scores(claim.worse, claim.metric))
        return Judged(claim, table, verdict, self._paper_difference(claim, table))

    def _paper_difference(self, claim: Claim, table: Table) -> dict[str, float]:
        """By data set, from the numbers in the claim's table, or else in the first table that has both."""
        for candidate in (table, *self.suite.tables):
            numbers = {row.experiment: row.paper.get(claim.metric, {}) for row in candidate.rows}
            better, worse = numbers.get(claim.better, {}), numbers.get(claim.worse, {})
            found = {
                column: better[column] - worse[column]
                for column in self.suite.paper_columns
                if better.get(column) is not None and worse.get(column) is not None
            }
            if found:
                return found
        return {}

    def quantity(self, text: str) -> str:
        """The number that ``a``, ``a - b`` or ``...: metric`` stands for; "" if it was not measured."""
        names, _, metric = (part.strip() for part in text.partition(":"))
        metric = metric or "mIoU"
        keys = [key.strip() for key in names.split(" - ")]
        known = metric in METRICS and len(keys) <= 2 and all(key in self.results for key in keys)
        scores = [self.scores(key, metric) for key in keys] if known else []
        if len(scores) == 2 and (difference := paired_difference(*scores)) is not None:
            return difference_text(difference, metric)
        return self.cell(keys[0], metric) if len(scores) == 1 and scores[0] else ""


def fill_in(text: str, found: Sequence[Measurements]) -> str:
    """A text with its ``{...}`` filled in from each of the measurements, separated by slashes; "" if one of them was
    not measured, or is no experiment of the suite.

    ``{a}`` is the mIoU of a, ``{a - b}`` the paired difference; ``{...: metric}`` takes another metric.
    """
    missing = False

    def number(match: re.Match[str]) -> str:
        nonlocal missing
        numbers = [measurements.quantity(match[1]) for measurements in found]
        missing = missing or not all(numbers)
        return " / ".join(numbers)

    filled = re.sub(r"\{([^{}]+)\}", number, text)
    return "" if missing else filled


def difference_text(difference: Difference, metric: str) -> str:
    """``+4.1 [+3.2, +5.0]``: mean and its confidence interval; only the mean without seeds, or with a single one."""
    digits = DIGITS[metric]
    text = f"{difference.mean:+.{digits}f}"
    if difference.seeds < 2:
        return text
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _value(result: dict[str, Any], metric: str) -> float | None:
    """A result's number; None if it was not measured, or is not a number."""
    if metric == "total_loss":
        value = (result["training"] or {}).get("total_loss")
    elif metric in SCORES:
        value = result["metrics"].get(metric, {}).get("score")
    else:
        value = result["metrics"].get(metric)
    return value if value is not None and math.isfinite(value) else None
