"""The demo's picture: scenes in rows; image, ground truth, predictions and the bias in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from reclip_d2.data.colors import colorize_labels
from reclip_d2.data.images import read_image
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.modeling import MaskCLIP, RectifiedCLIP
from reclip_d2.utils.io import atomic_write

TITLES = ("image", "ground truth", "MaskCLIP", "bias", "ReCLIP++", "with our extensions")


@torch.no_grad()
def predicted_labels(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """Label map ``(H, W)`` of an RGB image ``(H, W, 3)`` uint8."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    output = model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])[0]["sem_seg"]
    return (output if output.ndim == 2 else output.argmax(0)).cpu().numpy()


def bias_of_prediction(model: RectifiedCLIP, labels: np.ndarray) -> np.ndarray:
    """How much the bias favours CLIP's prediction: M_b of the predicted class, minus the mean over the classes.

    Args:
        model: a model with bias logits, in eval mode.
        labels: MaskCLIP's prediction ``(H, W)``.

    Returns:
        ``(h, w)`` float: positive where the model considers the prediction biased.
    """
    patch = model.backbone.patch_size
    height, width = labels.shape[0] // patch, labels.shape[1] // patch
    bias = model.bias_logits((height, width)).detach().cpu().unflatten(0, (height, width))
    bias = bias - bias.mean(-1, keepdim=True)
    # The prediction at the patches' centres.
    centres = torch.from_numpy(labels[patch // 2 :: patch, patch // 2 :: patch][:height, :width]).long()
    return bias.gather(-1, centres[..., None])[..., 0].numpy()


def draw_demo(
    path: Path,
    records: list[dict[str, Any]],
    dataset: str,
    maskclip: MaskCLIP,
    published: RectifiedCLIP,
    extended: RectifiedCLIP,
) -> None:
    """Write the picture (PNG).

    Args:
        records: a few labelled records, one per row.
        dataset: their registered data set.
    """
    metadata, labels_of = MetadataCatalog.get(dataset), DatasetLabels(dataset)
    colors = np.array(metadata.stuff_colors, dtype=np.uint8)
    rows = []
    for record in records:
        image = read_image(record["file_name"])
        truth = labels_of.read(record, image.shape[:2])
        labels = [predicted_labels(model, image) for model in (maskclip, published, extended)]
        rows.append((image, truth, labels, bias_of_prediction(extended, labels[0])))
    limit = max(float(np.abs(bias).max()) for *_, bias in rows) or 1.0

    figure = Figure(figsize=(2 * len(TITLES) + 0.9, 2 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots(len(rows), len(TITLES), squeeze=False)
    heat = None
    for line, (image, truth, (clip, rectified, ext), bias) in zip(axes, rows, strict=True):
        for axis, labels in zip(line[[1, 2, 4, 5]], (truth, clip, rectified, ext), strict=True):
            axis.imshow(colorize_labels(labels, colors), interpolation="nearest")
            if labels is not truth:
                known = truth != metadata.ignore_label
                accuracy = 100 * float((labels == truth)[known].mean())
                axis.set_xlabel(f"{accuracy:.0f} % of pixels right", fontsize=8, labelpad=2)
        line[0].imshow(image, interpolation="nearest")
        heat = line[3].imshow(bias, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=11)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    bar = figure.colorbar(heat, ax=axes[:, -1], fraction=0.08, pad=0.02)
    bar.set_label("bias towards the class that MaskCLIP predicts there (logits, ext. model)", fontsize=8)
    handles = [
        Patch(facecolor=color / 255, edgecolor="0.4", label=name)
        for color, name in zip(colors, metadata.stuff_classes, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    with atomic_write(path) as temporary, matplotlib.rc_context({"savefig.format": "png"}):
        figure.savefig(temporary, dpi=110)
