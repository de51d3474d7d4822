"""Scores of a folder of masks, whichever system has written them, by the labels of a registered data set.

Shape letters: C classes, K clusters, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog

from reclip_d2.data.classes import check_labelled, class_names_of
from reclip_d2.data.images import read_geometry
from reclip_d2.data.mask_files import NO_CLASS, MaskFiles, ids_of_names, images_of
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.class_preference import class_preference_score, row_normalized
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.evaluation.matching import match_many_to_one, match_one_to_one
from reclip_d2.evaluation.scores import iou_per_class, segmentation_scores
from reclip_d2.evaluation.space_preference import SpacePreferenceEvaluator


@dataclasses.dataclass
class FolderScores:
    """Scores of a folder.

    Attributes:
        images: number of images.
        scores: see :func:`~reclip_d2.evaluation.scores.segmentation_scores`, in percent.
        ious: IoU of each class in percent, NaN for a class that no label has.
        without_class: share of the labelled pixels without a predicted class, 0 to 1.
        clusters: name of the class of each cluster, None without one; None if ids are classes.
        class_preference: see ``reclip_d2.evaluation.class_preference``.
        space_preference: result of the ``SpacePreferenceEvaluator``, if it was asked for.
    """

    images: int
    scores: dict[str, float]
    ious: dict[str, float]
    without_class: float
    clusters: list[str | None] | None
    class_preference: float
    space_preference: dict[str, float] | None = None


class FolderEvaluation:
    """Compares the masks of a folder with the labels of a data set."""

    def __init__(self, dataset: str, masks: MaskFiles) -> None:
        """
        Raises:
            ReclipError: the data set is not registered or has no labels, or an image has no mask.
        """
        check_labelled(dataset)
        self.dataset = dataset
        self.masks = masks
        self.labels = DatasetLabels(dataset)
        self.records: list[dict[str, Any]] = DatasetCatalog.get(dataset)
        masks.check(images_of(self.records))

    def evaluate(self, matching: str = "", by: str = "pixels", space_preference: bool = False) -> FolderScores:
        """Scores of all images.

        Args:
            matching: "" if ids are classes; for clusters one of :data:`~reclip_d2.evaluation.matching.MATCHINGS`.
            by: see :func:`~reclip_d2.evaluation.matching.match_one_to_one`.
            space_preference: also measure the space-preference bias, in a second pass.
        """
        num_classes = self.labels.num_classes
        counts = self._count()
        table: np.ndarray | None = None
        if matching:
            found = (
                match_one_to_one(counts[:, :-1], by) if matching == "one-to-one" else match_many_to_one(counts[:, :-1])
            )
            table = np.append(found, NO_CLASS)
            counts = _merge_columns(counts, table, num_classes)
        elif counts.shape[1] > num_classes + 1:
            raise ReclipError(
                f"the masks have id {counts.shape[1] - 2}, but {self.dataset} has the classes 0 to {num_classes - 1}:"
                " give the names of the masks' ids (--names), or match clusters (--match)"
            )
        elif counts.shape[1] < num_classes + 1:
            missing = np.zeros((num_classes, num_classes + 1 - counts.shape[1]), dtype=np.int64)
            counts = np.hstack([counts[:, :-1], missing, counts[:, -1:]])
        names = self.labels.class_names
        return FolderScores(
            images=len(self.records),
            scores=segmentation_scores(counts),
            ious=dict(zip(names, (100 * iou_per_class(counts)).tolist(), strict=True)),
            without_class=float(counts[:, -1].sum() / counts.sum()),
            clusters=None if table is None else [None if k == NO_CLASS else names[k] for k in table[:-1]],
            class_preference=class_preference_score(row_normalized(counts)),
            space_preference=self._space_preference(table) if space_preference else None,
        )

    def _pairs(self) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """Record, mask and label ``(H, W)`` int64 of each image."""
        for record in self.records:
            size = read_geometry(record["file_name"]).upright
            yield record, self.masks.read(record["file_name"], size), self.labels.read(record, size).astype(np.int64)

    def _count(self) -> np.ndarray:
        """Labelled pixels by class and id of the mask, ``(C, K + 1)`` int64; the last column has those without one."""
        num_classes, counts = self.labels.num_classes, np.zeros((self.labels.num_classes, 1), dtype=np.int64)
        for _, mask, labels in self._pairs():
            valid = labels != self.labels.ignore_label
            ids = mask[valid]
            num_ids = max(int(ids.max(initial=-1)) + 1, counts.shape[1] - 1)
            ids = np.where(ids == NO_CLASS, num_ids, ids)
            found = np.bincount(labels[valid] * (num_ids + 1) + ids, minlength=num_classes * (num_ids + 1))
            found = found.reshape(num_classes, num_ids + 1)
            found[:, : counts.shape[1] - 1] += counts[:, :-1]
            found[:, -1] += counts[:, -1]
            counts = found
        if not counts.any():
            raise ReclipError(f"the labels of {self.dataset} contain no class, only ignored pixels")
        return counts

    def _space_preference(self, table: np.ndarray | None) -> dict[str, float]:
        evaluator = SpacePreferenceEvaluator(self.dataset, distributed=False)
        num_classes = self.labels.num_classes
        for record, mask, labels in self._pairs():
            classes = mask if table is None else table[np.minimum(mask, len(table) - 1)]
            evaluator.count(np.where(classes == NO_CLASS, num_classes, classes), labels, record)
        results = evaluator.evaluate()
        assert results is not None
        return results["space_preference"]


def class_ids(dataset: str, mask_names: list[list[str]] | None) -> list[int]:
    """Class of each mask id: the data set's own order, or by the names of the ids.

    Args:
        mask_names: names of each id from 0; None for the data set's order.
    """
    labels = DatasetLabels(dataset)
    if mask_names is None:
        return list(range(labels.num_classes))
    own = class_names_of(dataset)
    merged = [names[0] for names in own] != labels.class_names
    return ids_of_names(mask_names, [[name] for name in labels.class_names] if merged else own)


def _merge_columns(counts: np.ndarray, table: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts ``(C, C + 1)`` by class, from counts ``(C, K + 1)`` by cluster."""
    merged = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
    np.add.at(merged.T, np.where(table == NO_CLASS, num_classes, table), counts.T)
    return merged
