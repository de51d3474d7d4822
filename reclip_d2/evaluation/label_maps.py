"""Detectron2's ``SemSegEvaluator`` on label maps, and the check of label files before it reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils import comm
from PIL import Image
from torch import Tensor

from reclip_d2.errors import ReclipError


class _LabelMap:
    """A label map that answers ``argmax(dim=0)`` as the logits that it came from would."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def argmax(self, dim: int) -> Tensor:
        return self.labels


class LabelMapEvaluator(SemSegEvaluator):
    """``SemSegEvaluator`` that takes ``{"sem_seg": (H, W) int64 labels}`` as well as ``(C, H, W)`` logits.

    The numbers are Detectron2's, the mean apart (see :meth:`evaluate`). Each label file is checked before it is read,
    since an RGB label or an id out of range would end in a traceback, and binary masks would be counted without a word.
    """

    def reset(self) -> None:
        """Forget all counts."""
        super().reset()
        self._label_ids: set[int] = set()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Count one batch; see Detectron2's ``DatasetEvaluator``."""
        for record, output in zip(inputs, outputs, strict=True):
            self._label_ids |= check_label_file(
                self.input_file_to_gt_file[record["file_name"]],
                self._num_classes,
                self._ignore_label,
                tuple(output["sem_seg"].shape[-2:]),
            )
        wrapped = [
            {**output, "sem_seg": _LabelMap(output["sem_seg"])} if output["sem_seg"].ndim == 2 else output
            for output in outputs
        ]
        super().process(inputs, wrapped)

    def evaluate(self) -> dict[str, Any] | None:
        """Results of Detectron2's evaluator; on the main process only.

        The mIoU is the mean over the classes that occur in the labels. Detectron2 0.5 also divides by the classes that
        are only predicted, as if their IoU were 0; later versions do not.

        Raises:
            ReclipError: no label file has an id besides 0 and 255, the mark of binary masks, or none but the ignored.
        """
        ids = set().union(*comm.all_gather(self._label_ids)) if self._distributed else self._label_ids
        if ids == {self._ignore_label}:
            raise ReclipError(f"the labels of {self._dataset_name} hold no class, only ignored pixels")
        if self._num_classes > 1 and ids == {0, 255}:
            raise ReclipError(
                f"the labels of {self._dataset_name} hold 0 and 255 only: they are binary masks, not label maps;"
                " write PNGs of class ids"
            )
        results = super().evaluate()
        if results is not None:
            scores = results["sem_seg"]
            scores["mIoU"] = float(np.nanmean([v for key, v in scores.items() if key.startswith("IoU-")]))
        return results


def check_label_file(path: str, num_classes: int, ignore_label: int, size: tuple[int, int]) -> set[int]:
    """Ids of a label file; raise :class:`ReclipError` unless it is one: see :func:`read_label_file`."""
    return set(np.unique(read_label_file(path, num_classes, ignore_label, size)).tolist())


def read_label_file(path: str, num_classes: int, ignore_label: int, size: tuple[int, int]) -> np.ndarray:
    """Label map ``(H, W)`` of class ids, in the file's own integer type.

    Args:
        path: PNG.
        num_classes: ids are 0 to num_classes - 1, or ignore_label.
        size: (H, W) of the prediction.

    Raises:
        ReclipError: the file is no single-channel index image of that size with ids in range.
    """
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise ReclipError(f"label {path} does not exist: prepare the data set first") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ReclipError(f"label {path} cannot be read ({error}): prepare the data set again") from error
    if labels.ndim != 2 or mode not in ("L", "P", "I", "I;16"):
        raise ReclipError(f"label {path} is a {mode} image: write a single-channel PNG of class ids")
    if labels.shape != size:
        raise ReclipError(
            f"label {path} has size {labels.shape[1]}x{labels.shape[0]}, its image {size[1]}x{size[0]}:"
            " they must be the same"
        )
    ids = np.unique(labels)
    wrong = ids[(ids >= num_classes) & (ids != ignore_label)]
    if len(wrong):
        remedy = "prepare the data set again"
        if wrong.tolist() == [num_classes]:  # ids from 1 on, and perhaps 0 for background
            remedy = f"if its ids begin at 1, take 1 off them and write {ignore_label} for background"
        raise ReclipError(
            f"label {path} has id {wrong[0]}, but the classes are 0 to {num_classes - 1} and {ignore_label} is"
            f" ignored: {remedy}"
        )
    return labels
