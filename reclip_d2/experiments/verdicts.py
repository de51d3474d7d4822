"""Means over seeds, and the verdict on an ordering that a paper claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
HOLDS, FAILS, NOISE, UNKNOWN = "holds", "does not hold", "within noise", "not run"

Scores = Mapping[int | None, float]
"""A row's scores by seed; ``{None: score}`` of a row that depends on no seed."""


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± sample standard deviation``; the mean alone where all seeds agree (no training, no seed)."""
    mean = statistics.mean(values)
    if len(values) < 2 or max(values) == min(values):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


class Difference(NamedTuple):
    """Paired difference of two rows over the seeds that both were run with."""

    mean: float
    half_width: float
    """Half the confidence interval of the mean; 0 for two rows without seeds, infinite for a single seed."""
    seeds: int
    """How many; 0 for two rows without seeds."""


class Verdict(NamedTuple):
    """What the measurements say of a claimed ordering."""

    word: str
    difference: Difference | None


def paired_difference(better: Scores, worse: Scores) -> Difference | None:
    """``better - worse`` seed by seed. A row without seeds meets every seed of the other with its one score.

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

    It holds, or does not, where the 95 % confidence interval of the mean paired difference (Student's t, a degree of
    freedom fewer than seeds) leaves 0 out; else the difference is within noise. Two rows without seeds are judged by
    the sign. A single seed says nothing about noise: within noise.
    """
    difference = paired_difference(better, worse)
    if difference is None:
        return Verdict(UNKNOWN, None)
    if difference.mean == 0 or abs(difference.mean) <= difference.half_width:
        return Verdict(NOISE, difference)
    return Verdict(HOLDS if difference.mean > 0 else FAILS, difference)


def student_t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """t with ``P(|T| <= t) = confidence`` for Student's t of ``degrees`` degrees of freedom.

    Args:
        degrees: at least 1.
    """
    low, high = 0.0, 1.0
    while _central_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < confidence else (low, middle)
    return high


def _central_probability(t: float, degrees: int) -> float:
    """``P(|T| <= t)``: the finite series of Abramowitz and Stegun, 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):  # terms of cos^odd, cos^(odd + 2), ... up to cos^(degrees - 2)
        total += term
        term *= k / (k + 1) * cosine**2
    return (2 / math.pi) * (angle + sine * total) if odd else sine * total
