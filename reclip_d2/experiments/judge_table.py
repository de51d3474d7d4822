"""How well scores without labels rank runs: statistics and the table of docs/label_free.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata, spearmanr

from reclip_d2.experiments.judge_scores import COMBINED

MARGIN = 2.0
"""A run that is this many points worse than MaskCLIP hurt."""
FALLBACK, CALIBRATED = "maskclip", "calibrated"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A snapshot of a run, with its mIoU and its scores.

    Attributes:
        run: name.
        seed: of the run.
        final: whether it is the run's last model.
        oracle: whether its hypotheses are from labels.
        miou: in percent.
        scores: by name.
    """

    run: str
    seed: int
    final: bool
    oracle: bool
    miou: float
    scores: dict[str, float]


def with_combined(runs: Sequence[Judged]) -> list[Judged]:
    """The snapshots of a world with the scores of :data:`~reclip_d2.experiments.judge_scores.COMBINED` added."""
    added = {
        name: np.mean([rankdata([run.scores[part] for run in runs]) for part in parts], axis=0)
        for name, parts in COMBINED.items()
    }
    return [
        dataclasses.replace(run, scores={**run.scores, **{name: float(added[name][k]) for name in added}})
        for k, run in enumerate(runs)
    ]


def rank_correlation(runs: Sequence[Judged], score: str) -> float:
    """Spearman's rank correlation of a score with the mIoU."""
    return float(spearmanr([run.miou for run in runs], [run.scores[score] for run in runs]).statistic)


def caught(runs: Sequence[Judged], score: str) -> tuple[float, float]:
    """Of the runs that are worse than MaskCLIP by :data:`MARGIN` points, and of those that are better by as much, the
    fraction whose score is below MaskCLIP's; NaN if there are none."""
    base = next(run for run in runs if run.run == FALLBACK)

    def fraction(some: list[Judged]) -> float:
        return float(np.mean([run.scores[score] < base.scores[score] for run in some])) if some else float("nan")

    worse = [run for run in runs if run.miou <= base.miou - MARGIN]
    better = [run for run in runs if run.miou >= base.miou + MARGIN]
    return fraction(worse), fraction(better)


def loss_of_choice(runs: Sequence[Judged], score: str) -> float:
    """mIoU lost by choosing the model of the best score instead of that of the best mIoU."""
    return max(run.miou for run in runs) - max(runs, key=lambda run: run.scores[score]).miou


def losses_of_three(runs: Sequence[Judged], score: str) -> list[float]:
    """:func:`loss_of_choice` among MaskCLIP, calibrated MaskCLIP and a trained model, for each last model."""
    fixed = [next(run for run in runs if run.run == name) for name in (FALLBACK, CALIBRATED)]
    return [loss_of_choice([*fixed, run], score) for run in runs if run.final]


def correlation_of_others_choice(worlds: Mapping[str, Sequence[Judged]], left_out: str) -> tuple[str, float]:
    """The score with the highest mean rank correlation on the data sets other than ``left_out``, and its rank
    correlation there.

    Args:
        worlds: snapshots by ``<data set> <CLIP>``; all CLIPs of a data set are left out together.
        left_out: data set.
    """
    others = [runs for name, runs in worlds.items() if name.split()[0] != left_out]
    mine = [runs for name, runs in worlds.items() if name.split()[0] == left_out]
    names = others[0][0].scores
    best = max(names, key=lambda score: np.mean([rank_correlation(runs, score) for runs in others]))
    return best, float(np.mean([rank_correlation(runs, best) for runs in mine]))


def markdown(worlds: Mapping[str, Sequence[Judged]]) -> str:
    """The tables of all scores and worlds."""
    worlds = {name: with_combined(runs) for name, runs in worlds.items()}
    names = list(next(iter(worlds.values()))[0].scores)
    names.sort(key=lambda score: -min(rank_correlation(runs, score) for runs in worlds.values()))
    head = ["", *(f"{name} ({len(runs)})" for name, runs in worlds.items())]
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [_row([score, *(_correlations(runs, score) for runs in worlds.values())]) for score in names]
    judge = next(name for name in names if "the judge" in name)
    lines += ["", _row(["the judge", *worlds]), _row(["---"] * (len(worlds) + 1))]
    columns = [_judged(list(runs), judge) for runs in worlds.values()]
    lines += [_row([label, *(column[label] for column in columns)]) for label in columns[0]]
    datasets = list(dict.fromkeys(name.split()[0] for name in worlds))
    if len(datasets) > 1:
        lines.append("")
        for name in datasets:
            best, value = correlation_of_others_choice(worlds, name)
            lines.append(f"- leaving out {name}: the others choose “{best}”; its rank correlation there is {value:.2f}")
    return "\n".join(lines) + "\n"


def _correlations(runs: Sequence[Judged], score: str) -> str:
    final = [run for run in runs if run.final]
    return f"{rank_correlation(final, score):.2f} / {rank_correlation(runs, score):.2f}"


def _judged(runs: list[Judged], score: str) -> dict[str, str]:
    final = [run for run in runs if run.final]
    honest = [run for run in final if not run.oracle]
    worse, better = caught(runs, score)
    three = losses_of_three(runs, score)
    errors = np.array([run.scores[score] - run.miou for run in final])
    return {
        "caught, of the runs worse than MaskCLIP by 2 points": f"{100 * worse:.0f} %",
        "false alarms, of those better by 2 points": f"{100 * better:.0f} %",
        "mIoU lost by choosing among MaskCLIP, calibrated and one run: mean (largest)": (
            f"{np.mean(three):.2f} ({max(three):.1f})"
        ),
        "mIoU lost by choosing among all runs": f"{loss_of_choice(honest, score):.1f}",
        "estimate minus mIoU: mean, standard deviation": f"{errors.mean():+.1f}, {errors.std():.1f}",
    }


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
