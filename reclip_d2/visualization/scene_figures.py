"""Figures of scenes: logit parts (Fig. 4 of ReCLIP++) and predictions of several models (Fig. 5).

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reclip_d2.data.colors import colorize_labels
from reclip_d2.evaluation.logit_parts import LogitParts
from reclip_d2.utils.text import shorten
from reclip_d2.visualization.figures import add_legend, class_legend_entries, fold, hide_ticks, legend_height

MAX_LEGEND = 40
"""Maximum number of classes in a legend; the rarest are omitted."""


def pixels_right(prediction: np.ndarray, truth: np.ndarray, ignore_label: int) -> float:
    """Percentage of labelled pixels that are right; NaN without labelled pixels."""
    known = truth != ignore_label
    return 100 * float((prediction == truth)[known].mean()) if known.any() else float("nan")


def frequent_classes(maps: Sequence[np.ndarray], num_classes: int, count: int = MAX_LEGEND) -> list[int]:
    """Classes that occur in label maps, by id; the ``count`` most frequent if there are more."""
    pixels = np.zeros(num_classes, dtype=np.int64)
    for labels in maps:
        pixels += np.bincount(labels[labels < num_classes].astype(np.int64), minlength=num_classes)[:num_classes]
    chosen = np.argsort(-pixels, kind="stable")[:count]
    return sorted(int(k) for k in chosen if pixels[k])


def scene_figure(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray | None],
    predictions: dict[str, Sequence[np.ndarray]],
    class_names: Sequence[str],
    colors: np.ndarray,
    ignore_label: int = 255,
) -> Figure:
    """Fig. 5: one row per scene; image, ground truth (if available), and the predictions of each model.

    Args:
        images: ``(H, W, 3)`` uint8.
        truths: label maps ``(H, W)``; None without ground truth.
        predictions: for each model label maps ``(H, W)`` of the scenes.
        colors: ``(C, 3)`` uint8.
    """
    labelled = any(truth is not None for truth in truths)
    titles = ["image", *(["ground truth"] if labelled else []), *predictions]
    known = [truth for truth in truths if truth is not None]
    shown = frequent_classes([*known, *(m for maps in predictions.values() for m in maps)], len(class_names))
    legend = class_legend_entries(shown, class_names, colors, any((truth == ignore_label).any() for truth in known))
    width = 2.15 * len(titles) + 0.2
    heights = [2.1 * image.shape[0] / image.shape[1] + 0.22 for image in images]
    figure = Figure(figsize=(width, sum(heights) + 0.5 + legend_height(legend[1], width)), layout="constrained")
    grid = figure.subplots(len(images), len(titles), squeeze=False, height_ratios=heights)
    for row, (line, image, truth) in enumerate(zip(grid, images, truths, strict=True)):
        line[0].imshow(image)
        if labelled and truth is not None:
            line[1].imshow(colorize_labels(truth, colors, ignore_label), interpolation="nearest")
        for axes, maps in zip(line[len(titles) - len(predictions) :], predictions.values(), strict=True):
            axes.imshow(colorize_labels(maps[row], colors, ignore_label), interpolation="nearest")
            if truth is not None:
                axes.set_xlabel(f"{pixels_right(maps[row], truth, ignore_label):.0f} % of pixels right", fontsize=8)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(fold(title, 24), fontsize=11)
    for axes in grid.flat:
        hide_ticks(axes)
    add_legend(figure, *legend)
    return figure


def telling_classes(before: np.ndarray, after: np.ndarray, num_classes: int, count: int = 4) -> list[int]:
    """Most informative classes of a scene: those whose pixels differ most between two label maps, then the largest.

    Args:
        before: MaskCLIP's prediction.
        after: the ground truth or, without it, the rectified prediction; ids of C or more (ignored) do not count.
    """
    valid = after < num_classes
    before, after = before[valid], after[valid]
    differs = before != after
    changed, area = (
        sum(np.bincount(labels[mask], minlength=num_classes) for labels in (before, after))
        for mask in (differs, np.ones_like(differs))
    )
    order = sorted(range(num_classes), key=lambda k: (-changed[k], -area[k], k))
    return [k for k in order if area[k]][:count]


def logit_figure(
    image: np.ndarray,
    truth: np.ndarray | None,
    parts: LogitParts,
    class_ids: Sequence[int],
    class_names: Sequence[str],
    colors: np.ndarray,
    model_name: str,
    ignore_label: int = 255,
) -> Figure:
    """Fig. 4: the masks of one scene and, below, one row per class of Query, bias, rectified and mask logits.

    All logits are drawn minus their mean over the classes at the same place, which does not affect the argmax: red
    is where a class is favoured. Each column has one scale, so that classes can be compared. Outlined is the class in
    the ground truth or, without it, in the mask of M_o.

    Args:
        image: ``(H, W, 3)`` uint8.
        truth: ``(H, W)``, or None.
        class_ids: the rows.
        colors: ``(C, 3)`` uint8.
        model_name: name of the rectified model.
    """
    size = image.shape[:2]
    columns = (
        ("Query logits $M_q$", parts.query),
        ("bias logits $M_b$", parts.bias),
        ("rectified logits $M$", parts.rectified),
        ("mask logits $M_o$", parts.mask),
    )
    masks = [
        ("mask of $M_q$\n(Query)", parts.labels(parts.query, size).numpy()),
        ("mask of $M$", parts.labels(parts.rectified, size).numpy()),
        (f"mask of $M_o$\n({shorten(model_name, 24, '…')})", parts.labels(parts.mask, size).numpy()),
    ]
    outlines = {k: (masks[-1][1] if truth is None else truth) == k for k in class_ids}
    height = 2.25 * size[0] / size[1]
    heights = [height + 0.4, height + 0.3, *[height + 0.05] * (len(class_ids) - 1)]
    width = 5 * 2.3 + 0.4
    known = [] if truth is None else [truth]
    shown = frequent_classes([*known, *(labels for _, labels in masks)], len(class_names))
    legend = class_legend_entries(shown, class_names, colors, any((labels == ignore_label).any() for labels in known))
    figure = Figure(figsize=(width, sum(heights) + 0.8 + legend_height(legend[1], width)), layout="constrained")
    grid = figure.subplots(1 + len(class_ids), 5, squeeze=False, height_ratios=heights)
    _draw_masks(grid[0], image, truth, masks, colors, ignore_label)
    for row, class_id in enumerate(class_ids, start=1):
        grid[row, 0].imshow(image)
        grid[row, 0].set_ylabel(shorten(class_names[class_id], 20, "…"), fontsize=12, fontweight="bold")
        _outline(grid[row, 0], outlines[class_id])
    for column, (title, logits) in enumerate(columns, start=1):
        centred = logits - logits.mean(0, keepdim=True)
        heat = parts.at_pixels(centred[list(class_ids)], size).numpy()
        limit = max(float(np.abs(heat).max()), 1e-6)
        picture = None
        for row, class_id in enumerate(class_ids, start=1):
            axes = grid[row, column]
            picture = axes.imshow(heat[row - 1], cmap="RdBu_r", vmin=-limit, vmax=limit)
            _outline(axes, outlines[class_id])
            if row == 1:
                axes.set_title(title, fontsize=11)
        bar = figure.colorbar(picture, ax=grid[1:, column], location="bottom", fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.locator = MaxNLocator(nbins=4, symmetric=True)
        bar.update_ticks()
    for axes in grid.flat:
        hide_ticks(axes)
    add_legend(figure, *legend)
    return figure


def _outline(axes: Axes, mask: np.ndarray) -> None:
    """The outline of a mask ``(H, W)``, black on white, visible on any background."""
    if mask.any() and not mask.all():
        for color, width in (("white", 2.4), ("black", 1.1)):
            axes.contour(mask, levels=[0.5], colors=color, linewidths=width)


def _draw_masks(
    line: Sequence[Axes],
    image: np.ndarray,
    truth: np.ndarray | None,
    masks: Sequence[tuple[str, np.ndarray]],
    colors: np.ndarray,
    ignore_label: int,
) -> None:
    line[0].imshow(image)
    line[0].set_title("image", fontsize=11)
    if truth is None:
        line[1].axis("off")
    else:
        line[1].imshow(colorize_labels(truth, colors, ignore_label), interpolation="nearest")
        line[1].set_title("ground truth", fontsize=11)
    for axes, (title, labels) in zip(line[2:], masks, strict=True):
        axes.imshow(colorize_labels(labels, colors, ignore_label), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        if truth is not None:
            axes.set_xlabel(f"{pixels_right(labels, truth, ignore_label):.0f} % of pixels right", fontsize=8)
