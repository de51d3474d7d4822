"""Figures of the measured biases: Fig. 1 of ReCLIP++ for several models, and IoU per class.

Shape letters: C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from reclip_d2.evaluation.class_preference import class_preference_score, row_normalized
from reclip_d2.evaluation.preferences import Preference
from reclip_d2.evaluation.space_preference import DistanceCurve
from reclip_d2.utils.text import shorten
from reclip_d2.visualization.figures import add_legend, fold, hide_ticks, legend_height, model_style

MAX_CLASSES = 12
"""Maximum number of classes in a confusion matrix, for legibility."""
MAX_BARS = 30
"""Maximum number of classes in the IoU figure."""


def distance_figure(
    names: Sequence[str], curves: Sequence[DistanceCurve], scores: Sequence[float], min_objects: int
) -> Figure:
    """Fig. 1(a): IoU of objects against their distance from the image's centre, and the number of objects.

    Args:
        names: names of the models.
        curves: curves of the models, on the same objects.
        scores: space-preference scores, for the legend.
        min_objects: bins with fewer objects are drawn hollow, since they are not in the score.
    """
    figure = Figure(figsize=(7.6, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, (name, curve, score) in enumerate(zip(names, curves, scores, strict=True)):
        style = model_style(index)
        filled = curve.counts >= max(min_objects, 1)
        shown = curve.counts > 0
        label = f"{name} (score {score:.2f})" if math.isfinite(score) else f"{name} (no score)"
        # Shift the models' points, so that their error bars do not overlap.
        shift = (index - (len(names) - 1) / 2) * 0.012 * (curve.edges[-1] - curve.edges[0])
        x, y, error = curve.centres + shift, 100 * curve.ious, 100 * np.nan_to_num(curve.standard_errors)
        top.plot(x[shown], y[shown], color=style["color"], linewidth=1, linestyle=":")
        top.errorbar(x[filled], y[filled], error[filled], **style, markersize=6, linewidth=1.8, capsize=2, label=label)
        hollow = shown & ~filled
        top.errorbar(x[hollow], y[hollow], error[hollow], **style, markersize=6, linestyle="", markerfacecolor="white")
    top.set_ylabel("IoU of the objects (%)")
    top.set_ylim(bottom=0)
    top.grid(axis="y", color="0.9")
    top.set_axisbelow(True)
    top.legend(fontsize=9, loc="best")
    top.set_title("Space preference: IoU by distance from the image's centre (bars: ± standard error)", fontsize=11)
    if any(((curve.counts > 0) & (curve.counts < min_objects)).any() for curve in curves):
        top.annotate(
            f"hollow: fewer than {min_objects} objects, not in the score",
            (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color="0.35",
        )  # fmt: skip
    curve = curves[0]
    width = np.diff(curve.edges)
    bars = bottom.bar(curve.centres, curve.counts, width=0.92 * width, color="0.75")
    bottom.bar_label(bars, fontsize=8, padding=1)
    bottom.margins(y=0.3)
    bottom.set_ylabel("objects")
    bottom.set_xlabel("distance of the object's centroid from the image's (pixels)")
    bottom.set_xticks(curve.edges)
    return figure


def most_confused_classes(confusion: np.ndarray, count: int = MAX_CLASSES) -> list[int]:
    """Classes of the largest off-diagonal entries of the row-normalised matrix ``(C, C)``, sorted by id.

    Pairs are added from the largest entry down, until there are ``count`` classes; classes without pixels are excluded.
    """
    normalized = row_normalized(confusion)
    present = np.flatnonzero(~np.isnan(normalized.diagonal()))
    if len(present) <= count:
        return present.tolist()
    entries = normalized[np.ix_(present, present)].copy()
    np.fill_diagonal(entries, -1)
    chosen: list[int] = []
    for flat in np.argsort(-entries, axis=None, kind="stable"):
        for k in divmod(int(flat), len(present)):
            if present[k] not in chosen and len(chosen) < count:
                chosen.append(int(present[k]))
        if len(chosen) == count:
            break
    return sorted(chosen)


def confusion_figure(
    names: Sequence[str], confusions: Sequence[np.ndarray], class_ids: Sequence[int], class_names: Sequence[str]
) -> Figure:
    """Fig. 1(b): row-normalised confusion matrices of several models side by side.

    Args:
        names: of the models.
        confusions: ``(C, C)`` pixels by label and prediction. Rows are normalised over all classes, drawn or not.
        class_ids: the classes to draw.
        class_names: of all classes.
    """
    ticks = [shorten(class_names[k], 18, "…") for k in class_ids]
    count, rows = len(class_ids), math.ceil(len(names) / 3)
    columns = math.ceil(len(names) / rows)
    side = max(2.6, 0.34 * count)
    label_room = 0.075 * max(map(len, ticks))
    figure = Figure(
        figsize=(columns * (side + 0.25) + label_room + 1.1, rows * (side + 0.5) + label_room + 0.5),
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    picture = None
    for axes, name, confusion in zip(grid.flat, names, confusions, strict=False):
        normalized = row_normalized(confusion)
        part = 100 * normalized[np.ix_(class_ids, class_ids)]
        picture = axes.imshow(part, cmap="Blues", vmin=0, vmax=100)
        for i in range(count):
            for j in range(count):
                if part[i, j] >= 0.5:
                    color = "white" if part[i, j] > 55 else "0.15"
                    axes.text(j, i, f"{part[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(
            f"{fold(name, 40)}\nclass-preference score {class_preference_score(normalized):.2f}", fontsize=10
        )
        axes.set_xticks(range(count), ticks, rotation=90, fontsize=8)
        axes.set_yticks(range(count), ticks, fontsize=8)
        axes.tick_params(length=0, labelbottom=True)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("label")
    figure.supxlabel("prediction", fontsize=10)
    bar = figure.colorbar(picture, ax=grid, fraction=0.03, pad=0.01)
    bar.set_label("% of the label's pixels", fontsize=9)
    return figure


def class_iou_figure(names: Sequence[str], ious: Sequence[np.ndarray], class_names: Sequence[str]) -> Figure:
    """IoU of each class before (first model) and after (other models), sorted by the last model's gain.

    Shows at most the :data:`MAX_BARS` classes that change most, and no classes without labels.

    Args:
        names: of the models.
        ious: ``(C,)`` in percent for each model; NaN for classes without labels.
    """
    table = np.stack(ious)
    present = np.flatnonzero(~np.isnan(table[0]))
    change = table[-1] - table[0]
    chosen = present[np.argsort(-np.abs(change[present]), kind="stable")][:MAX_BARS]
    order = chosen[np.argsort(-change[chosen], kind="stable")]
    height = 0.8 / len(names)
    labels = [f"{name} (mIoU {np.nanmean(row):.1f})" for name, row in zip(names, table, strict=True)]
    bars_height = len(order) * (0.12 + 0.13 * len(names))
    figure = Figure(figsize=(7.6, 1.2 + bars_height + legend_height(labels, 7.6)), layout="constrained")
    axes = figure.subplots()
    for index in range(len(names)):
        places = np.arange(len(order)) + (index - (len(names) - 1) / 2) * height
        bars = axes.barh(places, table[index, order], height, color=model_style(index)["color"])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axes.set_yticks(range(len(order)), [shorten(class_names[k], 28, "…") for k in order], fontsize=9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("IoU (%)")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    titles = [f"IoU of each class, the largest gain of {names[-1]} first" if len(names) > 1 else "IoU of each class"]
    if len(order) < len(present):
        titles.append(f"({len(order)} of {len(present)} classes, with the largest changes)")
    axes.set_title("\n".join(titles), fontsize=11)
    add_legend(figure, [model_style(index)["color"] for index in range(len(names))], labels)
    return figure


MAX_MAPS = 48
"""Maximum number of classes to draw: half the most preferred, half the least preferred."""


def preference_figure(title: str, preference: Preference, class_names: Sequence[str]) -> Figure:
    """One map per class, the most preferred class first; red is preferred, blue avoided, on one scale.

    The number after a name is the class's overall strength.
    """
    order = np.argsort(-preference.strengths, kind="stable")
    if len(order) > MAX_MAPS:
        order = np.concatenate([order[: MAX_MAPS // 2], order[-MAX_MAPS // 2 :]])
    columns = min(6 if len(order) <= 24 else 8, len(order))
    rows = math.ceil(len(order) / columns)
    aspect = preference.maps.shape[1] / preference.maps.shape[2]
    figure = Figure(figsize=(1.55 * columns + 1.3, rows * (1.45 * aspect + 0.3) + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    # Let a few extreme values saturate, so that the others remain visible.
    limit = max(float(np.quantile(np.abs(preference.maps[order]), 0.99)), 1e-6)
    picture = None
    for axes, k in zip(grid.flat, order, strict=False):
        picture = axes.imshow(preference.maps[k], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(f"{shorten(class_names[k], 14, '…')} {preference.strengths[k]:+.2f}", fontsize=9)
        hide_ticks(axes)
    for axes in grid.flat[len(order) :]:
        axes.axis("off")
    bar = figure.colorbar(picture, ax=grid, fraction=0.03, pad=0.02, extend="both")
    unit = "log (mean soft-max / uniform)" if preference.source == "mean soft-max" else "bias logits × logit scale"
    bar.set_label(unit, fontsize=9)
    note = "" if len(order) == len(class_names) else f" ({len(order)} of {len(class_names)} classes)"
    figure.suptitle(title + note, fontsize=11)
    return figure
