"""CLIP's preference for each class and place, from unlabelled images; and the same in words.

Two sources, on one scale (logits inside CLIP's soft-max, 0 for no preference):

- the *mean soft-max* of MaskCLIP over many images. It reflects the content of the images as well as CLIP's preferences:
  only if all classes are equally frequent at all places, it is the bias alone.
- the *bias logits* M_b of a rectified model: what the model considers as bias.

Shape letters: C classes, (h, w) patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.evaluation.logit_parts import Mapper, crop_to_image, logit_parts

PLACES = (
    ("top-left", "top", "top-right"),
    ("left", "centre", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
_TINY = 1e-12


class Preference(NamedTuple):
    """Preference of each class at each place."""

    maps: np.ndarray
    """``(C, h, w)`` float64: positive where the class is preferred to the others."""
    strengths: np.ndarray
    """``(C,)`` float64: the preference for the class overall."""
    source: str
    """``mean soft-max`` or ``bias logits``."""
    images: int
    """Number of images that it is averaged over."""

    @property
    def place_maps(self) -> np.ndarray:
        """``(C, h, w)``: where a class is preferred, minus its overall preference."""
        return self.maps - self.strengths[:, None, None]


def preference_of_probabilities(mean: np.ndarray, images: int) -> Preference:
    """Log of the mean soft-max ``(C, h, w)`` over the uniform ``1 / C``; a strength is that of the class's mean."""
    num_classes = len(mean)
    maps = np.log(np.maximum(mean * num_classes, _TINY))
    strengths = np.log(np.maximum(mean.mean((1, 2)) * num_classes, _TINY))
    return Preference(maps, strengths, "mean soft-max", images)


def preference_of_bias(bias: np.ndarray, logit_scale: float, images: int) -> Preference:
    """Bias logits ``(C, h, w)`` times CLIP's logit scale, minus their mean over the classes, which does not affect the
    argmax."""
    maps = (bias - bias.mean(0, keepdims=True)) * logit_scale
    return Preference(maps, maps.mean((1, 2)), "bias logits", images)


def spread_records(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` records, evenly spaced."""
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    return [records[i] for i in chosen]


@torch.no_grad()
def mean_probability(model: nn.Module, mapper: Mapper, records: Sequence[dict[str, Any]]) -> Preference:
    """Preference from the mean soft-max of a model's mask logits, times CLIP's logit scale.

    The grid is the first image's; others are resized to it.

    Args:
        model: a model whose mask logits are cosine similarities (MaskCLIP), in eval mode.
        records: records of images; labels are not read.
    """

    def probabilities(record: dict[str, Any]) -> Tensor:
        image = model.preprocess_image([mapper(record)])
        logits = model.mask_logits(image.tensor, image.image_sizes) * model.backbone.logit_scale
        return crop_to_image(logits.softmax(1), tuple(image.tensor.shape[-2:]), tuple(image.image_sizes[0]))

    return preference_of_probabilities(_mean_map(map(probabilities, records)), len(records))


@torch.no_grad()
def mean_bias(model: nn.Module, mapper: Mapper, records: Sequence[dict[str, Any]]) -> Preference:
    """Preference from the bias logits of a rectified model, averaged over the images if the bias depends on them.

    Args:
        model: see :func:`~reclip_d2.evaluation.logit_parts.has_bias`.
        records: records of images; labels are not read.
    """
    if not getattr(model.bias_head, "image_dependent", True):
        records = records[:1]

    def bias(record: dict[str, Any]) -> Tensor:
        parts = logit_parts(model, mapper, record)
        return crop_to_image(parts.bias[None], parts.padded_size, parts.image_size)

    return preference_of_bias(_mean_map(map(bias, records)), model.backbone.logit_scale, len(records))


def _mean_map(maps: Any) -> np.ndarray:  # noqa: ANN401
    """Mean ``(C, h, w)`` float64 of maps ``(1, C, *, *)``, resized to the grid of the first."""
    total, count = None, 0
    for item in maps:
        item = item.double().cpu()
        if total is None:
            total = torch.zeros_like(item)
        if item.shape != total.shape:
            item = F.interpolate(item, size=total.shape[-2:], mode="bilinear", align_corners=False)
        total, count = total + item, count + 1
    return (total[0] / count).numpy()


def place_means(maps: np.ndarray) -> np.ndarray:
    """Mean of maps ``(C, h, w)`` in the nine places of :data:`PLACES`, ``(C, 3, 3)``.

    The places are thirds of the height and width; a cell in two thirds counts in both.
    """
    rows, columns = (_thirds(length) for length in maps.shape[1:])
    return np.stack([np.stack([maps[:, r, c].mean((1, 2)) for c in columns], -1) for r in rows], 1)


def _thirds(length: int) -> list[slice]:
    return [slice(i * length // 3, -(-(i + 1) * length // 3)) for i in range(3)]


class ClassPlaces(NamedTuple):
    """One class's preference, for a table."""

    name: str
    strength: float
    best_place: str
    best: float
    """Strength at the best place, minus the class's overall strength."""
    worst_place: str
    worst: float


def preferred_places(preference: Preference, class_names: Sequence[str]) -> list[ClassPlaces]:
    """Classes from the most to the least preferred, with the places where each is preferred most and least."""
    means = place_means(preference.place_maps).reshape(len(class_names), 9)
    places = [place for row in PLACES for place in row]
    lines = []
    for k in np.argsort(-preference.strengths, kind="stable"):
        best, worst = int(means[k].argmax()), int(means[k].argmin())
        lines.append(
            ClassPlaces(
                class_names[k],
                float(preference.strengths[k]),
                places[best],
                float(means[k, best]),
                places[worst],
                float(means[k, worst]),
            )
        )
    return lines


def agreement(first: Preference, second: Preference) -> tuple[float, float]:
    """Pearson correlation of two preferences: of the classes' strengths, and of the place maps.

    Shows whether M_b agrees with CLIP's observed preference. NaN if one of them is constant.
    """
    ours, theirs = first.place_maps, torch.from_numpy(second.place_maps)[None]
    if theirs.shape[-2:] != ours.shape[-2:]:
        theirs = F.interpolate(theirs, size=ours.shape[-2:], mode="bilinear", align_corners=False)
    return _correlation(first.strengths, second.strengths), _correlation(ours, theirs[0].numpy())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > _TINY else float("nan")
