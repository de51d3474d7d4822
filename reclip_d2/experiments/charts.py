"""Pictures of a suite's results: bars of a table, curves over a config key, intervals of the claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reclip_d2.experiments.measurements import CONFIDENCE, FAILS, HOLDS, NOISE, Measurements
from reclip_d2.experiments.suite import METRICS, Table
from reclip_d2.visualization.figures import MODEL_COLORS

BLUE, ORANGE, GREEN, RED = MODEL_COLORS[:4]
GROUP_COLORS = {"paper": BLUE, "control": "0.6", "ours": GREEN}
GROUP_TITLES = {"paper": "models of the papers", "control": "controls", "ours": "our extensions"}
VERDICT_COLORS = {HOLDS: GREEN, FAILS: RED, NOISE: "0.5"}


def table_chart(measurements: Measurements, table: Table) -> Figure | None:
    """Horizontal bars of a table's first metric: mean, standard deviation, and a dot for each seed.

    Returns:
        None if no row was run.
    """
    metric = table.metrics[0]
    rows = [row for row in table.rows if measurements.scores(row.experiment, metric)]
    if not rows:
        return None
    figure = Figure(figsize=(8.4, 1.5 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    groups = [measurements.suite.experiments[row.experiment].group for row in rows]
    ends = []
    for place, (row, group) in enumerate(zip(rows, groups, strict=True)):
        values = list(measurements.scores(row.experiment, metric).values())
        mean = statistics.mean(values)
        error = statistics.stdev(values) if len(values) > 1 else 0
        bar = {"xerr": error, "error_kw": {"capsize": 3, "linewidth": 1}} if error else {}
        axes.barh(place, mean, 0.7, color=GROUP_COLORS[group], alpha=0.85, **bar)
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", markersize=2.5, color="0.2")
        ends.append(max([mean + error, *values]))
    span = max(ends)
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        text = measurements.cell(row.experiment, metric)
        axes.text(end + 0.012 * span, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * span)
    axes.set_xlabel(METRICS[metric])
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=GROUP_COLORS[name], label=GROUP_TITLES[name]) for name in GROUP_COLORS if name in groups]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def curve_chart(measurements: Measurements, table: Table, values: Mapping[str, Sequence[float]]) -> Figure | None:
    """mIoU against config keys, one panel a curve (Fig. 3), with a line for the reference.

    Args:
        values: values of each curve's key at its points.

    Returns:
        None if no point was run.
    """
    metric = table.metrics[0]
    curves = [c for c in table.curves if any(measurements.scores(point, metric) for point in c.points)]
    if not curves:
        return None
    figure = Figure(figsize=(4.4 * len(curves) + 0.4, 3.7), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, curve in zip(panels, curves, strict=True):
        points = []
        for x, point in zip(values[curve.key], curve.points, strict=True):
            scores = list(measurements.scores(point, metric).values())
            if scores:
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                points.append((x, statistics.mean(scores), spread))
        xs, ys, errors = zip(*points, strict=True)
        axes.errorbar(xs, ys, errors, color=BLUE, marker="o", capsize=3, linewidth=1.8, label=curve.label)
        line = list(measurements.scores(curve.line, metric).values()) if curve.line else []
        if line:
            mean = statistics.mean(line)
            axes.axhline(mean, color=ORANGE, linestyle="--", linewidth=1.8, label=curve.line_title)
            if len(line) > 1:
                deviation = statistics.stdev(line)
                axes.axhspan(mean - deviation, mean + deviation, color=ORANGE, alpha=0.15, linewidth=0)
        axes.set_xticks(xs, [f"{x:.2g}" for x in xs], fontsize=8, rotation=45 if len(xs) > 5 else 0)
        axes.minorticks_off()
        axes.set_xlabel(f"{curve.symbol}  ({curve.key})", fontsize=9)
        axes.set_title(curve.title, fontsize=11)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.margins(y=0.15)
    panels[0].set_ylabel(METRICS[metric])
    if curves[0].label:
        panels[0].legend(fontsize=9, loc="best")
    return figure


def claim_chart(measurements: Measurements) -> Figure | None:
    """Mean paired difference of each claimed ordering in mIoU, with its confidence interval.

    Returns:
        None if none was measured over two seeds or more.
    """
    shown = [
        item
        for item in measurements.judge_all()
        if item.claim.metric == "mIoU" and item.verdict.difference is not None and item.verdict.difference.seeds != 1
    ]
    if not any(item.verdict.difference.seeds for item in shown):
        return None
    experiments = measurements.suite.experiments
    labels = []
    for item in shown:
        titles = [experiments[key].title for key in (item.claim.better, item.claim.worse)]
        labels.append(f"{item.table.short_title}: {titles[0]} > {titles[1]}")
    figure = Figure(figsize=(11, 1.4 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, item in enumerate(shown):
        difference, color = item.verdict.difference, VERDICT_COLORS[item.verdict.word]
        axes.errorbar(
            difference.mean, place, xerr=difference.half_width, fmt="o", color=color, markersize=5, capsize=3
        )  # fmt: skip
    axes.axvline(0, color="0.2", linewidth=1)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    # Intervals over two seeds may be very wide, so the scale is set by the means.
    limit = 1.5 * max(1.0, *(abs(item.verdict.difference.mean) for item in shown))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -limit), min(high, limit))
    axes.set_xlabel(f"difference in mIoU, {100 * CONFIDENCE:.0f} % interval", fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    words = [word for word in VERDICT_COLORS if any(item.verdict.word == word for item in shown)]
    handles = [Line2D([], [], color=VERDICT_COLORS[word], marker="o", label=word) for word in words]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure if math.isfinite(limit) else None
