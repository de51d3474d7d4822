"""Measuring space-preference bias (supplement of ReCLIP, section 6.2; ReCLIP++, section IV-D, Fig. 1(a), Table VII).

The papers average the IoU of objects over bins of their distance from the image's centre, and the slopes of that curve
between neighbouring bins. Decisions that they leave open:

- *objects*: connected regions of a class, or instances; see :func:`~reclip_d2.evaluation.objects.find_objects`;
- *IoU of an object*: see :func:`~reclip_d2.evaluation.objects.object_ious`;
- *unit of the slope*. Table VII has -0.50 for MaskCLIP on VOC and names none. VOC's images are about 500 x 375 px, and
  centroids lie up to 200 px from the centre. In IoU per pixel, or in percent per pixel, -0.50 would mean a
    drop of 100 points or more within that range, which is impossible; in percent per bin of 40 px, a drop of 2.5. In
    IoU (0 to 1) per half image diagonal (312 px) it is a drop of 32 points: this is the unit of the score, since it
    also compares data sets of different resolution. This is our inference; the paper does not state it. The slope in
    percent per pixel is reported too.

For bins of equal width without gaps, the mean slope is the slope of the line through the first and the last bin, so
their few objects determine it. Bins with few objects are therefore excluded from the score (not from the curve), the
score has a standard error, and a line fitted to all objects (not in the paper) is drawn too. Small and truncated
objects are further out and harder for any model: use the score to compare models on one data set; a negative score
alone does not prove a bias.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from reclip_d2.data.index_images import read_index_image
from reclip_d2.evaluation.label_evaluator import LabelEvaluator
from reclip_d2.evaluation.objects import centroid_distances, find_objects, object_areas, object_ious


class DistanceCurve(NamedTuple):
    """IoU of objects by the distance of their centroid from the image's: one entry per bin, including empty bins."""

    edges: np.ndarray
    """``(bins + 1,)``, in pixels: bin b holds ``edges[b] <= distance < edges[b + 1]``."""
    counts: np.ndarray
    """``(bins,)`` int64: number of objects in the bin."""
    ious: np.ndarray
    """``(bins,)``: mean IoU of the objects, 0 to 1; NaN in an empty bin."""
    standard_errors: np.ndarray
    """``(bins,)``: standard error of the mean, for independent objects; NaN below two objects."""

    @property
    def centres(self) -> np.ndarray:
        """``(bins,)``: middle of each bin, in pixels."""
        return (self.edges[:-1] + self.edges[1:]) / 2


def distance_curve(distances: np.ndarray, ious: np.ndarray, bin_width: float) -> DistanceCurve:
    """Mean IoU of the objects in bins of their distance: [0, width), [width, 2 width), ... up to the furthest object.

    Args:
        distances: ``(N,)`` in pixels.
        ious: ``(N,)`` in [0, 1].
        bin_width: in pixels.
    """
    index = np.floor_divide(distances, bin_width).astype(np.int64)
    bins = int(index.max(initial=-1)) + 1
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.bincount(index, weights=ious, minlength=bins) / counts
        squares = np.bincount(index, weights=(ious - means[index]) ** 2, minlength=bins)
        errors = np.where(counts > 1, np.sqrt(squares / (counts - 1) / counts), np.nan)
    return DistanceCurve(np.arange(bins + 1) * float(bin_width), counts, means, errors)


def mean_slope(curve: DistanceCurve, min_objects: int = 1) -> tuple[float, float]:
    """Mean of the slopes between neighbouring bins (section IV-D); bins with too few objects are skipped.

    Args:
        min_objects: bins with fewer are skipped; 1 skips only empty bins.

        Returns:
            Slope in IoU (0 to 1) per pixel, and its standard error; NaN with fewer than two bins.
    """
    used = curve.counts >= max(min_objects, 1)
    if used.sum() < 2:
        return math.nan, math.nan
    # The mean slope is linear in the bins' means: collect their weights, for the standard error.
    steps = 1 / np.diff(curve.centres[used]) / (used.sum() - 1)
    weights = np.append(0, steps) - np.append(steps, 0)
    error = np.sqrt(((weights * curve.standard_errors[used]) ** 2).sum())
    return float(weights @ curve.ious[used]), float(error)


def fitted_slope(distances: np.ndarray, ious: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line through all objects, and its standard error; NaN if there is no such line.

    Args:
        distances: ``(N,)`` in pixels.
        ious: ``(N,)`` in [0, 1].

    Returns:
        Both in IoU (0 to 1) per pixel.
    """
    if len(distances) < 3 or np.ptp(distances) == 0:
        return math.nan, math.nan
    x = distances - distances.mean()
    slope = x @ ious / (x @ x)
    residuals = ious - ious.mean() - slope * x
    return float(slope), float(np.sqrt(residuals @ residuals / (len(x) - 2) / (x @ x)))


def compare_slopes(
    distances: np.ndarray, before: np.ndarray, after: np.ndarray, bin_width: float, min_objects: int = 1
) -> tuple[float, float]:
    """Difference of two models' mean slopes on the same objects, ``after - before``, and its standard error.

    The slope is linear in the objects' IoUs, so the difference is the slope of the differences. Since the IoUs of both
    models are strongly correlated, its error is smaller than those of the two slopes.

    Args:
        distances, before, after: ``(N,)`` of the same objects in the same order.
    """
    return mean_slope(distance_curve(distances, after - before, bin_width), min_objects)


class SpacePreferenceEvaluator(LabelEvaluator):
    """Space-preference score of a model's predictions: see the module.

    If a record has ``instance_file_name`` (PNG of instance ids, 0 for none, of the label's size), its objects are
    instances. After :meth:`evaluate`, on the main process, ``curve`` holds the :class:`DistanceCurve`, ``distances``
    and ``ious`` ``(N,)`` all objects, and ``half_diagonal`` the mean over the images, in pixels.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        bin_width: float = 40,
        min_object_area: int = 100,
        min_bin_objects: int = 20,
    ) -> None:
        """
        Args:
            dataset_name, distributed, output_dir: see :class:`LabelEvaluator`.
            bin_width: in pixels of the label files.
            min_object_area: in pixels; smaller objects do not count.
            min_bin_objects: bins with fewer objects are not in the score.
        """
        super().__init__(dataset_name, distributed, output_dir)
        self.bin_width = bin_width
        self.min_object_area = min_object_area
        self.min_bin_objects = min_bin_objects

    def reset(self) -> None:
        """Reset all objects."""
        self.curve: DistanceCurve | None = None
        self.distances = self.ious = np.zeros(0)
        self.half_diagonal = math.nan
        self._distances: list[np.ndarray] = []
        self._ious: list[np.ndarray] = []
        self._half_diagonals: list[float] = []

    def count(self, prediction: np.ndarray, labels: np.ndarray, record: dict[str, Any]) -> None:
        instance_file = record.get("instance_file_name")
        instances = read_instance_file(instance_file, labels.shape) if instance_file else None
        objects = find_objects(labels, self.ignore_label, instances)
        large = object_areas(objects) >= self.min_object_area
        self._distances.append(centroid_distances(objects)[large])
        self._ious.append(object_ious(objects, prediction, labels, self.ignore_label)[large])
        self._half_diagonals.append(math.hypot(*labels.shape) / 2)

    def evaluate(self) -> dict[str, Any] | None:
        """Score and curve; on the main process only.

        Returns:
            ``{"space_preference": ...}`` with ``score`` and ``standard_error`` (IoU, 0 to 1, per half image diagonal),
            ``fitted_score`` and ``fitted_standard_error`` (the same unit), ``slope_percent_per_pixel``, ``objects``
            (how many), and for each bin with objects ``IoU-<from>-<to>px`` in percent and ``objects-<from>-<to>px``.
        """
        gathered = self.gather((self._distances, self._ious, self._half_diagonals))
        if gathered is None:
            return None
        self.distances, self.ious = (
            np.concatenate([np.zeros(0), *(part for parts in gathered for part in parts[i])]) for i in (0, 1)
        )
        diagonals = [value for parts in gathered for value in parts[2]]
        self.half_diagonal = half_diagonal = float(np.mean(diagonals)) if diagonals else math.nan
        self.curve = curve = distance_curve(self.distances, self.ious, self.bin_width)
        slope, error = mean_slope(curve, self.min_bin_objects)
        fitted, fitted_error = fitted_slope(self.distances, self.ious)
        result: dict[str, float] = {
            "score": slope * half_diagonal,
            "standard_error": error * half_diagonal,
            "fitted_score": fitted * half_diagonal,
            "fitted_standard_error": fitted_error * half_diagonal,
            "slope_percent_per_pixel": 100 * slope,
            "objects": float(len(self.distances)),
        }
        for low, high, objects, iou in zip(curve.edges, curve.edges[1:], curve.counts, curve.ious, strict=False):
            if objects:
                result[f"IoU-{low:g}-{high:g}px"] = 100 * float(iou)
                result[f"objects-{low:g}-{high:g}px"] = float(objects)
        self.write(
            "space_preference",
            {
                **{key: value for key, value in result.items() if "-" not in key},
                "half_diagonal_pixels": half_diagonal,
                "min_object_area": self.min_object_area,
                "min_bin_objects": self.min_bin_objects,
                "curve": curve._asdict(),
            },
        )
        return OrderedDict(space_preference=result)


def read_instance_file(path: str, size: tuple[int, int]) -> np.ndarray:
    """Instance ids ``(H, W)`` int64; 255 is no instance in an 8-bit file (VOC's border).

    Raises:
        ReclipError: the file is missing, not a single-channel index PNG, not of the label's size, or has a palette in
            an another order.
    """
    instances = read_index_image(
        path,
        size,
        "its label",
        what="instances",
        remedy="prepare the data set again",
        wrong_mode="write a single-channel PNG of instance ids",
    )
    ids = instances.astype(np.int64)
    return np.where(ids == 255, 0, ids) if instances.dtype == np.uint8 else ids
