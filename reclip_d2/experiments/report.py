"""The report of a suite: tables, verdicts and pictures, all from the results of its runs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
from reclip_d2.experiments.runner import duration_text
from reclip_d2.experiments.suite import METRICS, PAPER_DIGITS, Suite, Table, value_of
from reclip_d2.utils.io import atomic_write
from reclip_d2.visualization.figures import save_figure

NOT_LEGIBLE = "?"


def write_report(measurements: Measurements, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the Markdown file and its pictures (``images/<name of the report>_*.png`` beside it).

    Args:
        command: that makes the runs, for the reader.

    Returns:
        the files, the report first.
    """
    pictures = _draw(measurements, path)
    lines = [*_head(measurements), *_summary(measurements, pictures)]
    for table in measurements.suite.tables:
        lines += _table(measurements, table, pictures)
    lines += [*_runs(measurements), *_foot(measurements, command)]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [path, *(path.parent / name for name in pictures.values())]


def _draw(measurements: Measurements, path: Path) -> dict[str, str]:
    """Draw what there is to draw; paths relative to the report by table key (``claims`` for the verdicts)."""
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


# ---- parts of the page --------------------------------------------------------------------------------------------


def _head(measurements: Measurements) -> list[str]:
    suite, seeds = measurements.suite, measurements.seeds
    results = measurements.all_results()
    datasets = sorted({result["dataset"] for result in results if "mIoU" in result["metrics"]})
    protocols = sorted({result["protocol"] for result in results if result["protocol"]})
    papers = " and ".join(f"“paper, {name}”" for name in suite.paper_columns)
    names = f" on {', '.join(f'`{name}`' for name in datasets)}" if datasets else ""
    lines = [
        f"# The papers' tables on `{suite.name}`",
        "",
        f"ReCLIP (CVPR 2024) and ReCLIP++, run by `tools/reproduce.py`. mIoU in percent{names}"
        f"{f' ({protocols[0]})' if protocols else ''}, by Detectron2's SemSegEvaluator; mean ± sample standard"
        f" deviation over the seeds {' '.join(map(str, seeds))}. A row without ± depends on no seed.",
        "",
    ]
    if suite.text:
        lines += [suite.text, ""]
    if papers:
        lines += [
            f"The columns {papers} are copied from the papers; `{NOT_LEGIBLE}` is a number of theirs that was not"
            " legible in our copies. Rows called *control* are no models of the papers: what they gain too"
            " is not the method's. Rows called *ours* are extensions of this project.",
            "",
        ]
    return lines


def _rule(seeds: int) -> str:
    quantile = f" (with {seeds} seeds ± {student_t_quantile(seeds - 1):.2f} standard errors)" if seeds > 1 else ""
    return (
        f"A claimed ordering **{HOLDS}** if the mean difference of the two rows, taken seed by seed, is above 0, and"
        f" **{FAILS}** if it is below, where the {100 * CONFIDENCE:.0f} % confidence interval of that mean"
        f"{quantile}, Student's t, leaves 0 out; else it is **{NOISE}**. Two rows without seeds are compared by the"
        " sign alone. The interval is in brackets. It covers the noise of training, not the choice of the test images."
    )


def _summary(measurements: Measurements, pictures: dict[str, str]) -> list[str]:
    judged = measurements.judge_all()
    if not judged:
        return []
    lines = ["## What holds", "", _rule(len(measurements.seeds)), ""]
    words = (HOLDS, FAILS, NOISE, UNKNOWN)
    lines += [f"| orderings | {' | '.join(words)} |", "|---|---|---|---|---|"]
    for title, ours in (("claimed by the papers", False), ("asked by us", True)):
        counts = Counter(item.verdict.word for item in judged if (item.claim.source == "ours") == ours)
        if counts:
            lines.append(f"| {title} | {' | '.join(str(counts[word]) for word in words)} |")
    lines += ["", *_picture(pictures, "claims", "Differences of the claimed orderings with their intervals")]
    open_claims = [item for item in judged if item.verdict.word in (FAILS, NOISE) and item.claim.source != "ours"]
    if open_claims:
        lines += ["Claims of the papers that do not hold, or not clearly; more at their tables:", ""]
        lines += [
            f"- {item.table.short_title}: {_ordering(measurements, item)}: {item.verdict.word}" for item in open_claims
        ]
        lines.append("")
    return lines


def _table(measurements: Measurements, table: Table, pictures: dict[str, str]) -> list[str]:
    lines = [f"## {table.title}", ""]
    if table.text:
        lines += [table.text, ""]
    columns: list[tuple[str, str, str]] = []  # heading, metric, data set of the paper
    for metric in table.metrics:
        columns.append((METRICS[metric], metric, ""))
        for name in measurements.suite.paper_columns:
            if any(name in row.paper.get(metric, {}) for row in table.rows):
                columns.append((f"paper, {name}", metric, name))
    lines.append(" | ".join(["| model", *(heading for heading, _, _ in columns), "training (s) |"]))
    lines.append("|---" * (len(columns) + 2) + "|")
    for row in table.rows:
        cells = []
        for _, metric, name in columns:
            if not name:
                cells.append(measurements.cell(row.experiment, metric))
                continue
            numbers = row.paper.get(metric, {})
            cells.append(_paper_number(numbers[name], metric) if name in numbers else "")
        lines.append(" | ".join([f"| {row.title}", *cells, f"{measurements.training_seconds(row.experiment)} |"]))
    lines += ["", *_picture(pictures, table.key, table.title)]
    for claim in table.claims:
        item = measurements.judge(claim, table)
        lines.append(_claim_line(measurements, item))
        if item.explanation:
            lines.append(f"  {item.explanation}")
    return [*lines, ""] if table.claims else lines


def _paper_number(number: float | None, metric: str) -> str:
    return NOT_LEGIBLE if number is None else f"{number:.{PAPER_DIGITS[metric]}f}"


def _ordering(measurements: Measurements, item: Judged) -> str:
    titles = [measurements.suite.experiments[key].title for key in (item.claim.better, item.claim.worse)]
    metric = "" if item.claim.metric == "mIoU" else f" ({METRICS[item.claim.metric]})"
    return f"{titles[0]} > {titles[1]}{metric}"


def _claim_line(measurements: Measurements, item: Judged) -> str:
    text = f"- **{item.verdict.word}**: {_ordering(measurements, item)}"
    difference = item.verdict.difference
    if difference is not None:
        seeds = {0: "no seeds", 1: "1 seed: noise unknown"}.get(difference.seeds, f"{difference.seeds} seeds")
        text += f": {difference_text(difference, item.claim.metric)} ({seeds})"
    paper = ", ".join(f"{name} {value:+.{PAPER_DIGITS[item.claim.metric]}f}" for name, value in item.paper.items())
    source = "Asked by us" if item.claim.source == "ours" else item.claim.source
    return f"{text}. {source}{f': {paper}' if paper else ''}."


def _picture(pictures: dict[str, str], key: str, title: str) -> list[str]:
    return [f"![{title}]({pictures[key]})", ""] if key in pictures else []


def _runs(measurements: Measurements) -> list[str]:
    """Every experiment with its config: what a reader needs to run one of them alone."""
    suite = measurements.suite
    shown = {row.experiment: None for table in suite.tables for row in table.rows}
    lines = [
        "## The runs",
        "",
        f"Each is its config file in `configs/{suite.configs.name}` with these overrides; results with all settings are"
        " in `runs/<experiment>[-seedN]/result.json` of the output folder.",
        "",
        "| experiment | config | overrides | needs | seconds, all of it |",
        "|---|---|---|---|---|",
    ]
    for key in suite.needed(list(shown)):
        experiment = suite.experiments[key]
        overrides = {k: v for k, v in experiment_options(suite, experiment).items() if k not in suite.common}
        words = " ".join(f"`{name} {value}`" for name, value in overrides.items())
        seconds = [result["seconds"] for result in measurements.results[key].values()]
        mean = f"{sum(seconds) / len(seconds):.0f}" if seconds else "not run"
        kind = experiment.config + (f" ({experiment.kind})" if experiment.kind in ("probe", "hypotheses") else "")
        lines.append(f"| `{key}` | {kind} | {words} | {experiment.teacher} | {mean} |")
    if suite.common:
        lines += ["", "All of them: " + ", ".join(f"`{key} {value}`" for key, value in suite.common.items()) + "."]
    return [*lines, ""]


def busy_seconds(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals ``(start, end)``: how long runs were at work, some of them at a time."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _foot(measurements: Measurements, command: Sequence[str]) -> list[str]:
    results = measurements.all_results()
    machines = sorted({result["machine"] for result in results})
    versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results})
    total = duration_text(busy_seconds([(r["started"], r["started"] + r["seconds"]) for r in results]))
    own_times = duration_text(sum(r["seconds"] for r in results))
    resumed = sum(bool((result["training"] or {}).get("first_iteration")) for result in results)
    lines = ["## How this was measured", "", "```", shlex.join(command), "```", ""]
    lines.append(f"{len(results)} runs in {total}; their own times add up to {own_times}.")
    if resumed:
        lines.append(f"{resumed} of them were stopped and went on; their time before the stop is not counted.")
    lines += [f"Machine: {'; '.join(machines)}.", f"Versions: {'; '.join(versions)}."] if results else []
    if measurements.stale:
        names = ", ".join(f"`{name}`" for name in measurements.stale)
        lines.append(f"Left out, since they were made with another config: {names}.")
    if measurements.failed:
        lines.append(f"Failed: {', '.join(f'`{key}`' for key in sorted(measurements.failed))}.")
    return lines
