"""The report of a suite: tables, verdicts and pictures, all from the results of its runs."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reclip_d2.experiments.charts import claim_chart, curve_chart, table_chart
from reclip_d2.experiments.measurements import (
    CONFIDENCE,
    FAILS,
    HOLDS,
    NOISE,
    UNKNOWN,
    Judged,
    Measurements,
    difference_text,
    student_t_quantile,
)
from reclip_d2.experiments.plan import experiment_options, resolve
from reclip_d2.experiments.suite import METRICS, PAPER_DIGITS, Suite, Table, value_of
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.progress import duration_in_words
from reclip_d2.utils.templates import render
from reclip_d2.visualization.figures import save_figure

NOT_LEGIBLE = "?"


def write_report(measurements: Measurements, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the Markdown file and its pictures (``images/<name of the report>_*.png`` next to it).

    Args:
        command: the command that makes the runs, shown in the report.

        Returns:
            The files, the report first.
    """
    pictures = _draw(measurements, path)
    results = measurements.all_results()
    page = render(
        "reclip_d2.experiments",
        "report.md.jinja",
        suite=measurements.suite,
        seeds=measurements.seeds,
        pictures=pictures,
        not_legible=NOT_LEGIBLE,
        tables=[_table(measurements, table) for table in measurements.suite.tables],
        runs=_runs(measurements),
        results=results,
        command=shlex.join(command),
        stale=measurements.stale,
        failed=sorted(measurements.failed),
        **_summary(measurements),
        **_measured(results),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [path, *(path.parent / name for name in pictures.values())]


def _draw(measurements: Measurements, path: Path) -> dict[str, str]:
    """Draw the charts; returns paths relative to the report by table key (``claims`` for the verdicts)."""
    figures = {}
    for table in measurements.suite.tables:
        if table.curves:
            figures[table.key] = curve_chart(measurements, table, curve_values(measurements.suite, table))
        elif table.chart:
            figures[table.key] = table_chart(measurements, table)
    figures["claims"] = claim_chart(measurements)
    pictures = {}
    for key, figure in figures.items():
        if figure is not None:
            pictures[key] = f"images/{path.stem.lower()}_{key.lower()}.png"
            save_figure(figure, path.parent / pictures[key])
    return pictures


def curve_values(suite: Suite, table: Table) -> dict[str, list[float]]:
    """Values of each curve's key at its points, from the configs."""
    return {
        curve.key: [value_of(resolve(suite, suite.experiments[point]), curve.key) for point in curve.points]
        for curve in table.curves
    }


# ---- values for the template ----------------------------------------------------------------------------------


def _summary(measurements: Measurements) -> dict[str, Any]:
    """The number of claims that hold, and the papers' claims that do not."""
    judged = measurements.judge_all()
    words, seeds = (HOLDS, FAILS, NOISE, UNKNOWN), len(measurements.seeds)
    counts = []
    for title, ours in (("claimed by the papers", False), ("asked by us", True)):
        found = Counter(item.verdict.word for item in judged if (item.claim.source == "ours") == ours)
        counts += [(title, [found[word] for word in words])] if found else []
    return {
        "words": words,
        "counts": counts,
        "percent": f"{100 * CONFIDENCE:.0f}",
        "quantile": f"{student_t_quantile(seeds - 1):.2f}" if seeds > 1 else "",
        "open_claims": [
            (item.table.short_title, _ordering(measurements, item), item.verdict.word)
            for item in judged
            if item.verdict.word in (FAILS, NOISE) and item.claim.source != "ours"
        ],
    }


def _table(measurements: Measurements, table: Table) -> dict[str, Any]:
    """Header, cells and claims of a table."""
    columns: list[tuple[str, str, str]] = []  # heading, metric, data set of the paper
    for metric in table.metrics:
        columns.append((METRICS[metric], metric, ""))
        for name in measurements.suite.paper_columns:
            if any(name in row.paper.get(metric, {}) for row in table.rows):
                columns.append((f"paper, {name}", metric, name))
    rows = []
    for row in table.rows:
        cells = [
            _paper_number(row.paper.get(metric, {}), name, metric)
            if name
            else measurements.cell(row.experiment, metric)
            for _, metric, name in columns
        ]
        rows.append([row.title, *cells, measurements.training_seconds(row.experiment)])
    return {
        "key": table.key,
        "title": table.title,
        "text": table.text,
        "header": ["model", *(heading for heading, _, _ in columns), "training (s)"],
        "rows": rows,
        "claims": [_claim(measurements, measurements.judge(claim, table)) for claim in table.claims],
    }


def _paper_number(numbers: Mapping[str, float | None], name: str, metric: str) -> str:
    if name not in numbers:
        return ""
    number = numbers[name]
    return NOT_LEGIBLE if number is None else f"{number:.{PAPER_DIGITS[metric]}f}"


def _ordering(measurements: Measurements, item: Judged) -> str:
    titles = [measurements.suite.experiments[key].title for key in (item.claim.better, item.claim.worse)]
    metric = "" if item.claim.metric == "mIoU" else f" ({METRICS[item.claim.metric]})"
    return f"{titles[0]} > {titles[1]}{metric}"


def _claim(measurements: Measurements, item: Judged) -> dict[str, str]:
    """A claim with its verdict, in words."""
    difference = ""
    if item.verdict.difference is not None:
        count = item.verdict.difference.seeds
        seeds = {0: "no seeds", 1: "1 seed: noise unknown"}.get(count, f"{count} seeds")
        difference = f"{difference_text(item.verdict.difference, item.claim.metric)} ({seeds})"
    digits = PAPER_DIGITS[item.claim.metric]
    return {
        "word": item.verdict.word,
        "ordering": _ordering(measurements, item),
        "difference": difference,
        "source": "Asked by us" if item.claim.source == "ours" else item.claim.source,
        "paper": ", ".join(f"{name} {value:+.{digits}f}" for name, value in item.paper.items()),
        "explanation": item.explanation,
    }


def _runs(measurements: Measurements) -> list[dict[str, Any]]:
    """Every experiment with its config, for running one of them alone."""
    suite = measurements.suite
    shown = {row.experiment: None for table in suite.tables for row in table.rows}
    runs = []
    for key in suite.needed(list(shown)):
        experiment = suite.experiments[key]
        seconds = [result["seconds"] for result in measurements.results[key].values()]
        kind = f" ({experiment.kind})" if experiment.kind in ("probe", "hypotheses") else ""
        overrides = experiment_options(suite, experiment)
        runs.append(
            {
                "key": key,
                "config": experiment.config + kind,
                "overrides": {name: value for name, value in overrides.items() if name not in suite.common},
                "teacher": experiment.teacher,
                "seconds": f"{statistics.mean(seconds):.0f}" if seconds else "not run",
            }
        )
    return runs


def busy_seconds(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals ``(start, end)``: the total time in which any run was active."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _measured(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Data, time, machine and versions of the results."""
    protocols = sorted({result["protocol"] for result in results if result["protocol"]})
    return {
        "datasets": sorted({result["dataset"] for result in results if "mIoU" in result["metrics"]}),
        "protocol": protocols[0] if protocols else "",
        "busy": duration_in_words(busy_seconds([(r["started"], r["started"] + r["seconds"]) for r in results]), step=1),
        "own_times": duration_in_words(sum(r["seconds"] for r in results), step=1),
        "resumed": sum(bool((result["training"] or {}).get("first_iteration")) for result in results),
        "machines": sorted({result["machine"] for result in results}),
        "versions": sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results}),
    }
