"""The report of a suite: tables, verdicts and pictures, all from the results of its runs."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reclip_d2.experiments.across import AcrossConditions, JudgedAcross
from reclip_d2.experiments.charts import claim_chart, curve_chart, table_chart
from reclip_d2.experiments.measurements import (
    CONFIDENCE,
    FAILS,
    HOLDS,
    MIXED,
    NOISE,
    UNKNOWN,
    Judged,
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


def write_report(measured: AcrossConditions, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the Markdown file and its pictures (``images/<name of the report>_*.png`` next to it).

    Args:
        command: the command that makes the runs, shown in the report.

        Returns:
            The files, the report first.
    """
    pictures = _draw(measured, path)
    results = measured.all_results()
    page = render(
        "reclip_d2.experiments",
        "report.md.jinja",
        suite=measured.suite,
        conditions=list(measured.by_condition),
        seeds=measured.first.seeds,
        pictures=pictures,
        not_legible=NOT_LEGIBLE,
        tables=[_table(measured, table) for table in measured.suite.tables],
        runs=_runs(measured),
        results=results,
        pretrainings=measured.pretrainings,
        command=shlex.join(command),
        stale=[name for m in measured.by_condition.values() for name in m.stale],
        failed=sorted({name for m in measured.by_condition.values() for name in m.failed}),
        **_summary(measured),
        **_measured(results),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [path, *(path.parent / name for name in pictures.values())]


def _draw(measured: AcrossConditions, path: Path) -> dict[str, str]:
    """Draw the charts; returns paths relative to the report by table key (``claims`` for the verdicts)."""
    figures = {}
    for table in measured.suite.tables:
        if table.curves:
            figures[table.key] = curve_chart(measured, table, curve_values(measured.suite, table))
        elif table.chart:
            figures[table.key] = table_chart(measured, table)
    figures["claims"] = claim_chart(measured)
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


def _summary(measured: AcrossConditions) -> dict[str, Any]:
    """The number of claims that hold, and the papers' claims that do not."""
    judged = measured.judge_all()
    several, seeds = len(measured.by_condition) > 1, len(measured.first.seeds)
    words = (HOLDS, FAILS, *((MIXED,) if several else ()), NOISE, UNKNOWN)
    counts = []
    for title, ours in (("claimed by the papers", False), ("asked by us", True)):
        chosen = [item for item in judged if (item.claim.source == "ours") == ours]
        if not chosen:
            continue
        if several:
            for condition in measured.by_condition:
                on = [item.by_condition[condition] for item in chosen if condition in item.by_condition]
                found = Counter(item.verdict.word for item in on)
                counts.append((f"{title}, on {condition.title}", [found[word] for word in words]))
        found = Counter(item.word for item in chosen)
        counts.append((f"**{title}, on all**" if several else title, [found[word] for word in words]))
    return {
        "words": words,
        "counts": counts,
        "percent": f"{100 * CONFIDENCE:.0f}",
        "quantile": f"{student_t_quantile(seeds - 1):.2f}" if seeds > 1 else "",
        "open_claims": [
            (item.table.short_title, _ordering(measured.suite, item), item.word)
            for item in judged
            if item.word in (FAILS, MIXED, NOISE) and item.claim.source != "ours"
        ],
    }


def _table(measured: AcrossConditions, table: Table) -> dict[str, Any]:
    """Header, cells and claims of a table."""
    suite, on = measured.suite, measured.of_table(table)
    columns: list[str] = []
    cells: list[list[str]] = [[] for _ in table.rows]
    for metric in table.metrics:
        for condition, measurements in on.items():
            columns.append(METRICS[metric] + (f", {condition.title}" if len(on) > 1 else ""))
            for own, row in zip(cells, table.rows, strict=True):
                own.append(measurements.cell(row.experiment, metric))
        for name in suite.paper_columns:
            if any(name in row.paper.get(metric, {}) for row in table.rows):
                columns.append(f"paper, {name}")
                for own, row in zip(cells, table.rows, strict=True):
                    own.append(_paper_number(row.paper.get(metric, {}), name, metric))
    sources = [row.source for row in table.rows] if any(row.source for row in table.rows) else []
    return {
        "key": table.key,
        "title": table.title,
        "text": table.text,
        "header": ["model", *columns, "training (s)", *(["published numbers from"] if sources else [])],
        "rows": [
            [row.title, *own, measured.training_seconds(row.experiment), *sources[place : place + 1]]
            for place, (own, row) in enumerate(zip(cells, table.rows, strict=True))
        ],
        "grids": _grids(measured, table),
        "claims": [_claim(suite, measured.judge(claim, table)) for claim in table.claims],
    }


def _grids(measured: AcrossConditions, table: Table) -> list[dict[str, Any]]:
    """The table's grid, once for each metric and condition; empty if it has none."""
    if table.grid is None:
        return []
    on = measured.of_table(table)
    return [
        {
            "title": METRICS[metric] + (f", {condition.title}" if len(on) > 1 else ""),
            "header": ["model", *table.grid.columns],
            "rows": [
                [title, *(measurements.cell(key, metric) if key else "" for key in keys)]
                for title, keys in table.grid.lines
            ],
        }
        for metric in table.metrics
        for condition, measurements in on.items()
    ]


def _paper_number(numbers: Mapping[str, float | None], name: str, metric: str) -> str:
    if name not in numbers:
        return ""
    number = numbers[name]
    return NOT_LEGIBLE if number is None else f"{number:.{PAPER_DIGITS[metric]}f}"


def _ordering(suite: Suite, item: JudgedAcross) -> str:
    titles = [suite.experiments[key].title for key in (item.claim.better, item.claim.worse)]
    metric = "" if item.claim.metric == "mIoU" else f" ({METRICS[item.claim.metric]})"
    return f"{titles[0]} > {titles[1]}{metric}"


def _claim(suite: Suite, item: JudgedAcross) -> dict[str, Any]:
    """A claim with its verdict, in words."""
    digits = PAPER_DIGITS[item.claim.metric]
    return {
        "word": item.word,
        "ordering": _ordering(suite, item),
        "verdicts": [
            {"condition": condition.title, "word": judged.verdict.word, "difference": _difference(judged)}
            for condition, judged in item.by_condition.items()
        ],
        "source": "Asked by us" if item.claim.source == "ours" else item.claim.source,
        "paper": ", ".join(f"{name} {value:+.{digits}f}" for name, value in item.paper.items()),
        "explanation": item.explanation,
    }


def _difference(judged: Judged) -> str:
    """``+4.1 [+3.2, +5.0] (3 seeds)``."""
    difference = judged.verdict.difference
    if difference is None:
        return ""
    seeds = {0: "no seeds", 1: "1 seed: noise unknown"}.get(difference.seeds, f"{difference.seeds} seeds")
    return f"{difference_text(difference, judged.claim.metric)} ({seeds})"


def _runs(measured: AcrossConditions) -> list[dict[str, Any]]:
    """Every experiment with its config, for running one of them alone."""
    suite = measured.suite
    shown = {row.experiment: None for table in suite.tables for row in table.rows}
    runs = []
    for key in suite.needed(list(shown)):
        experiment = suite.experiments[key]
        seconds = [result["seconds"] for m in measured.by_condition.values() for result in m.results[key].values()]
        kind = f" ({experiment.kind})" if experiment.kind in ("probe", "hypotheses") else ""
        overrides = experiment_options(suite, experiment)
        runs.append(
            {
                "key": key,
                "config": experiment.config + kind,
                "overrides": {name: value for name, value in overrides.items() if name not in suite.common},
                "teacher": experiment.teacher,
                "seconds": f"{statistics.median(seconds):.0f}" if seconds else "not run",
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
    return {
        "datasets": sorted({(r["dataset"], r["protocol"]) for r in results if "mIoU" in r["metrics"]}),
        "busy": duration_in_words(busy_seconds([(r["started"], r["started"] + r["seconds"]) for r in results]), step=1),
        "own_times": duration_in_words(sum(r["seconds"] for r in results), step=1),
        "resumed": sum(bool((result["training"] or {}).get("first_iteration")) for result in results),
        "machines": sorted({result["machine"] for result in results}),
        "versions": sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results}),
    }
