"""Pictures on the page: reduced copies, overlays, the legend, heat maps.

Shape letters: C classes, (H, W) size of an image in pixels, (h, w) of its reduced copy.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.evaluation.logit_parts import LogitParts
from reclip_d2.formats import MaskClasses, Prediction
from reclip_d2.formats.pictures import OverlayWriter
from reclip_d2.utils.text import number
from reclip_d2.visualization.figures import hide_ticks
from reclip_d2.visualization.reduced import reduce_image

_THUMBNAIL = 192
_HEAT_SIDE = 480
_SLIDER_RATIO = 1.5  # minimum width / height of the slider's pictures
_MARGIN = 235


def thumbnail(image: np.ndarray) -> np.ndarray:
    """A small copy of an image ``(H, W, 3)`` uint8."""
    return reduce_image(image, _THUMBNAIL)


def widen(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add margins, ignored in the labels, to a narrow image ``(h, w, 3)`` and its labels ``(h, w)``: the page's slider
    is misplaced on pictures that leave room at its sides."""
    height, width = labels.shape
    missing = max(0, math.ceil(_SLIDER_RATIO * height) - width)
    left, right = missing // 2, missing - missing // 2
    return (
        np.pad(image, ((0, 0), (left, right), (0, 0)), constant_values=_MARGIN),
        np.pad(labels, ((0, 0), (left, right)), constant_values=IGNORE_LABEL),
    )


def write_overlay(folder: Path, name: str, image: np.ndarray, labels: np.ndarray | None, classes: MaskClasses) -> Path:
    """Write an image ``(h, w, 3)``, widened, as a JPEG, with its mask ``(h, w)`` as an overlay or without a mask.

    Returns:
        path of the JPEG.
    """
    if labels is None:
        labels = np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
    image, labels = widen(image, labels)
    writer = OverlayWriter(folder, classes)
    path = PurePosixPath(f"{name}.jpg")
    writer.add(Prediction(path, labels, image=image))
    return writer.files(path)[0]


def legend_html(
    classes: MaskClasses, before: Mapping[str, int], after: Mapping[str, int] | None, background: Sequence[str]
) -> str:
    """Table of the classes: colour, name, share of pixels before and after; most frequent first.

    Args:
        before, after: number of pixels per id.
        background: names whose pixels are ignored.
    """
    total = max(sum(before.values()), 1)
    latest = before if after is None else after
    order = sorted(range(len(classes.names)), key=lambda k: (-latest.get(str(k), 0), -before.get(str(k), 0), k))
    rows = [(classes.names[k], "rgb({}, {}, {})".format(*classes.colors[k]), str(k)) for k in order]
    if background:
        rows.append((f"background: {', '.join(background)}", "transparent", str(IGNORE_LABEL)))
    columns = [before] if after is None else [before, after]
    lines = []
    for name, color, key in rows:
        shares = [100 * counts.get(key, 0) / total for counts in columns]
        if after is not None:
            change = round(shares[1] - shares[0], 1)
            cells = [number(shares[0]), number(shares[1]), number(change, sign=True) if change else "0.0"]
        else:
            cells = [number(shares[0])]
        faint = "" if any(shares) else ' class="absent"'
        lines.append(
            f'<tr{faint}><td><span class="swatch" style="background: {color}"></span>{html.escape(name)}</td>'
            + "".join(f'<td class="number">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    titles = ["CLIP"] if after is None else ["before", "after", "change"]
    head = "".join(f'<th class="number">{title}</th>' for title in titles)
    return (
        f'<table class="legend"><thead><tr><th>class, % of pixels</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


HEAT_MAPS = (
    ("query", "CLIP's logits"),
    ("bias", "bias: subtracted from them"),
    ("rectified", "rectified logits"),
)
"""Parts of the logits that are drawn, and their titles."""


def heat_maps(image: np.ndarray, parts: LogitParts, class_id: int) -> dict[str, np.ndarray]:
    """Logits of a class at the pixels of an image, minus the mean over all classes, which does not change the argmax.

    Args:
        image: ``(h, w, 3)``; only its size is used.

    Returns:
        for each of :data:`HEAT_MAPS` a map ``(h, w)`` float32. The bias is positive where CLIP prefers the class.
    """
    maps = {}
    for name, _ in HEAT_MAPS:
        logits = getattr(parts, name)
        centred = logits[class_id] - logits.mean(0)
        maps[name] = parts.at_pixels(centred[None], image.shape[:2])[0].numpy()
    return maps


def draw_heat_map(image: np.ndarray, heat: np.ndarray, title: str) -> np.ndarray:
    """Draw a heat map ``(h, w)`` over the greyed image ``(h, w, 3)``, with a colour bar: red above 0, blue below.

    Returns:
        a picture ``(., ., 3)`` uint8.
    """
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32) / 255
    limit = max(float(np.abs(heat).max()), 1e-6)
    height, width = image.shape[:2]
    figure = Figure(figsize=(3.6, min(3.6 * height / width, 3.4) + 0.9), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)
    axes = figure.subplots()
    axes.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1)
    picture = axes.imshow(heat, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.7)
    axes.set_title(title, fontsize=10, loc="left")
    hide_ticks(axes)
    bar = figure.colorbar(picture, ax=axes, location="bottom", fraction=0.06, pad=0.03)
    bar.ax.tick_params(labelsize=9)
    bar.locator = MaxNLocator(nbins=4, symmetric=True)
    bar.update_ticks()
    return _pixels(figure)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # the constrained layout needs a second pass
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def heat_image(image: np.ndarray) -> np.ndarray:
    """Small copy of an image for heat maps, which are smooth and small on the page."""
    return reduce_image(image, _HEAT_SIDE)
