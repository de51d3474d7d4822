"""Shared by the figures of the bias report: colours, class legends, saving.

Shape letters: C classes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch

from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.text import shorten

MODEL_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C564B", "#000000")
"""Okabe and Ito's colours, distinct for any colour vision; further models reuse them."""
MODEL_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def model_style(index: int) -> dict[str, str]:
    """Colour and marker of a model by its index in the report, the same in all figures."""
    return {
        "color": MODEL_COLORS[index % len(MODEL_COLORS)],
        "marker": MODEL_MARKERS[(index + index // len(MODEL_MARKERS)) % len(MODEL_MARKERS)],
    }


def fold(name: str, width: int) -> str:
    """A model's name in at most two lines of ``width`` characters."""
    lines = textwrap.wrap(name, width) or [""]
    return "\n".join(lines if len(lines) <= 2 else [lines[0], shorten(" ".join(lines[1:]), width, "…")])


def hide_ticks(axes: Axes) -> None:
    """Show axes as a picture, without ticks."""
    axes.set_xticks([])
    axes.set_yticks([])


def legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend below a figure.

    Args:
        width: width of the figure in inches.
    """
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), int(width * 72 / (5.2 * longest + 38))))
    return columns, math.ceil(len(labels) / columns)


def legend_height(labels: Sequence[str], width: float) -> float:
    """Height in inches that :func:`add_legend` takes."""
    return 0.2 + 0.19 * legend_shape(labels, width)[1]


def add_legend(figure: Figure, colors: Sequence[Any], labels: Sequence[str]) -> Legend:
    """Legend below the figure: one patch per colour, with its label."""
    handles = [
        Patch(facecolor=color, edgecolor="0.4", label=label) for color, label in zip(colors, labels, strict=True)
    ]
    columns, _ = legend_shape(labels, figure.get_figwidth())
    return figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def class_legend_entries(
    class_ids: Sequence[int], class_names: Sequence[str], colors: np.ndarray, ignored: bool = False
) -> tuple[list[Any], list[str]]:
    """Colours and labels of a legend of classes.

    Args:
        colors: ``(C, 3)`` uint8.
        ignored: whether the pictures have ignored pixels (black).
    """
    extra = [("black", "(ignored)")] if ignored else []
    entries = [*((tuple(colors[k] / 255), class_names[k]) for k in class_ids), *extra]
    return [color for color, _ in entries], [label for _, label in entries]


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> Path:
    """Write a PNG atomically."""
    # Run the constrained layout twice: only the second run knows the legend's height.
    figure.draw_without_rendering()
    with atomic_write(path) as temporary, matplotlib.rc_context({"savefig.format": "png"}):
        figure.savefig(temporary, dpi=dpi, pil_kwargs={"optimize": True})
    return path
