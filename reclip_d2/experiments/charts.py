"""Pictures of a suite's results: bars of a table, curves over a config key, intervals of the claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reclip_d2.experiments.across import AcrossConditions
from reclip_d2.experiments.measurements import CONFIDENCE, FAILS, HOLDS, NOISE, Measurements
from reclip_d2.experiments.suite import METRICS, Curve, Table
from reclip_d2.visualization.figures import MODEL_COLORS

BLUE, ORANGE, GREEN, RED = MODEL_COLORS[:4]
GROUP_COLORS = {"paper": BLUE, "control": "0.6", "ours": GREEN}
GROUP_TITLES = {"paper": "models of the papers", "control": "controls", "ours": "our extensions"}
MARKERS = "osD^v"
VERDICT_COLORS = {HOLDS: GREEN, FAILS: RED, NOISE: "0.5"}


def table_chart(measured: AcrossConditions, table: Table) -> Figure | None:
    """Horizontal bars of a table's first metric: mean, standard deviation, and a dot for each seed. One panel a
    condition.

    Returns:
        None if no row was run.
    """
    metric = table.metrics[0]
    panels = {
        condition: measurements
        for condition, measurements in measured.of_table(table).items()
        if any(measurements.scores(row.experiment, metric) for row in table.rows)
    }
    if not panels:
        return None
    experiments = measured.suite.experiments
    width = 8.4 if len(panels) == 1 else 3.6 + 3.1 * len(panels)
    figure = Figure(figsize=(width, 1.5 + 0.34 * len(table.rows)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (condition, measurements) in zip(all_axes, panels.items(), strict=True):
        _bars(axes, measurements, table)
        if len(panels) > 1:
            axes.set_title(condition.title.replace("`", ""), fontsize=10)
    groups = {experiments[row.experiment].group for row in table.rows}
    handles = [Patch(color=GROUP_COLORS[name], label=GROUP_TITLES[name]) for name in GROUP_COLORS if name in groups]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _bars(axes: Axes, measurements: Measurements, table: Table) -> None:
    """The bars of one panel, a row of the table each; rows that were not run are empty."""
    metric = table.metrics[0]
    ends = []
    for place, row in enumerate(table.rows):
        values = list(measurements.scores(row.experiment, metric).values())
        if not values:
            continue
        mean = statistics.mean(values)
        error = statistics.stdev(values) if len(values) > 1 else 0
        bar = {"xerr": error, "error_kw": {"capsize": 3, "linewidth": 1}} if error else {}
        color = GROUP_COLORS[measurements.suite.experiments[row.experiment].group]
        axes.barh(place, mean, 0.7, color=color, alpha=0.85, **bar)
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", markersize=2.5, color="0.2")
        ends.append((place, max([mean + error, *values]), measurements.cell(row.experiment, metric)))
    span = max(end for _, end, _ in ends)
    for place, end, text in ends:
        axes.text(end + 0.012 * span, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(table.rows)), [row.title for row in table.rows], fontsize=9)
    axes.set_ylim(len(table.rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * span)
    axes.set_xlabel(METRICS[metric])
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curve_chart(measured: AcrossConditions, table: Table, values: Mapping[str, Sequence[float]]) -> Figure | None:
    """mIoU against config keys, one panel a curve (Fig. 3), with a line for the reference. One row a condition.

    Args:
        values: values of each curve's key at its points.

    Returns:
        None if no point was run.
    """
    metric = table.metrics[0]

    def run(measurements: Measurements, curve: Curve) -> bool:
        return any(measurements.scores(point, metric) for point in curve.points)

    on = {c: m for c, m in measured.of_table(table).items() if any(run(m, curve) for curve in table.curves)}
    curves = [curve for curve in table.curves if any(run(m, curve) for m in on.values())]
    if not curves:
        return None
    figure = Figure(figsize=(4.4 * len(curves) + 0.4, 3.7 * len(on)), layout="constrained")
    rows = figure.subplots(len(on), len(curves), squeeze=False, sharey="row")
    for panels, (condition, measurements) in zip(rows, on.items(), strict=True):
        for axes, curve in zip(panels, curves, strict=True):
            if run(measurements, curve):
                _curve(axes, measurements, curve, metric, values[curve.key])
            if len(on) > 1:
                axes.set_title(f"{curve.title}, {condition.title}".replace("`", ""), fontsize=11)
        panels[0].set_ylabel(METRICS[metric])
    if curves[0].label:
        rows[0][0].legend(fontsize=9, loc="best")
    return figure


def _curve(axes: Axes, measurements: Measurements, curve: Curve, metric: str, values: Sequence[float]) -> None:
    """One panel: a curve and its line."""
    points = []
    for x, point in zip(values, curve.points, strict=True):
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


def claim_chart(measured: AcrossConditions) -> Figure | None:
    """Mean paired difference of each claimed ordering in mIoU, with its confidence interval. One marker a condition.

    Returns:
        None if none was measured over two seeds or more.
    """
    shown = [
        (item, {condition: judged.verdict for condition, judged in item.by_condition.items()})
        for item in measured.judge_all()
        if item.claim.metric == "mIoU"
    ]
    shown = [
        (item, {c: v for c, v in verdicts.items() if v.difference is not None and v.difference.seeds != 1})
        for item, verdicts in shown
    ]
    shown = [(item, verdicts) for item, verdicts in shown if verdicts]
    differences = [verdict.difference for _, verdicts in shown for verdict in verdicts.values()]
    if not any(difference.seeds for difference in differences if difference is not None):
        return None
    experiments, conditions = measured.suite.experiments, list(measured.by_condition)
    labels = []
    for item, _ in shown:
        titles = [experiments[key].title for key in (item.claim.better, item.claim.worse)]
        labels.append(f"{item.table.short_title}: {titles[0]} > {titles[1]}")
    figure = Figure(figsize=(11, 1.4 + (0.25 + 0.1 * (len(conditions) - 1)) * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (_, verdicts) in enumerate(shown):
        for condition, verdict in verdicts.items():
            index = conditions.index(condition)
            y = place + 0.7 * ((index + 0.5) / len(conditions) - 0.5)
            difference, color = verdict.difference, VERDICT_COLORS[verdict.word]
            marker = MARKERS[index % len(MARKERS)]
            axes.errorbar(
                difference.mean, y, xerr=difference.half_width, fmt=marker, color=color, markersize=5, capsize=3
            )  # fmt: skip
    axes.axvline(0, color="0.2", linewidth=1)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    # Intervals over two seeds may be very wide, so the scale is set by the means.
    limit = 1.5 * max(1.0, *(abs(difference.mean) for difference in differences))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -limit), min(high, limit))
    axes.set_xlabel(f"difference in mIoU, {100 * CONFIDENCE:.0f} % interval", fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    words = {verdict.word for _, verdicts in shown for verdict in verdicts.values()}
    handles = [Line2D([], [], color=color, linewidth=3, label=w) for w, color in VERDICT_COLORS.items() if w in words]
    if len(conditions) > 1:
        handles += [
            Line2D([], [], color="0.2", linestyle="", marker=marker, label=condition.title.replace("`", ""))
            for condition, marker in zip(conditions, MARKERS * len(conditions), strict=False)
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure if math.isfinite(limit) else None
