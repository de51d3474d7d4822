"""Figure of what a CLIP prefers: a map of each class over the image's places.

Shape letters: C classes, (h, w) patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from reclip_d2.evaluation.preferences import Preference
from reclip_d2.visualization.figures import hide_ticks, shorten

MAX_MAPS = 48
"""Most classes that are drawn: half of them the most preferred, half the least."""


def preference_figure(title: str, preference: Preference, class_names: Sequence[str]) -> Figure:
    """A map a class, the most preferred class first; red is preferred, blue avoided, on one scale.

    The number beside a name is the class's strength as a whole.
    """
    order = np.argsort(-preference.strengths, kind="stable")
    if len(order) > MAX_MAPS:
        order = np.concatenate([order[: MAX_MAPS // 2], order[-MAX_MAPS // 2 :]])
    columns = min(6 if len(order) <= 24 else 8, len(order))
    rows = math.ceil(len(order) / columns)
    aspect = preference.maps.shape[1] / preference.maps.shape[2]
    figure = Figure(figsize=(1.55 * columns + 1.3, rows * (1.45 * aspect + 0.3) + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    # Of many values a few are extreme: they may saturate, the rest should be seen.
    limit = max(float(np.quantile(np.abs(preference.maps[order]), 0.99)), 1e-6)
    picture = None
    for axes, k in zip(grid.flat, order, strict=False):
        picture = axes.imshow(preference.maps[k], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(f"{shorten(class_names[k], 14)} {preference.strengths[k]:+.2f}", fontsize=9)
        hide_ticks(axes)
    for axes in grid.flat[len(order) :]:
        axes.axis("off")
    bar = figure.colorbar(picture, ax=grid, fraction=0.03, pad=0.02, extend="both")
    unit = "log (mean soft-max / uniform)" if preference.source == "mean soft-max" else "bias logits × logit scale"
    bar.set_label(unit, fontsize=9)
    note = "" if len(order) == len(class_names) else f" ({len(order)} of {len(class_names)} classes)"
    figure.suptitle(title + note, fontsize=11)
    return figure
