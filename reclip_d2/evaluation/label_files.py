"""Label files of registered data sets, for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog

from reclip_d2.data.index_images import PLAIN, Palette, read_index_image
from reclip_d2.data.orientation import SIDEWAYS, turn_upright
from reclip_d2.errors import ReclipError


def read_label_file(
    path: str,
    num_classes: int,
    ignore_label: int,
    size: tuple[int, int],
    palette: Palette = PLAIN,
    orientation: int = 1,
) -> np.ndarray:
    """Label map ``(H, W)`` of class ids, in the file's integer type.

    Args:
        path: PNG.
        num_classes: ids are 0 to num_classes - 1, or ignore_label.
        size: (H, W) of the prediction.
        palette: what the colours of palette PNGs mean.
        orientation: EXIF orientation of the stored label; 1 if it is upright.

    Raises:
        ReclipError: the file is no single-channel index PNG of that size with ids in range, or has a palette in an
            another order.
    """
    ids = read_index_image(
        path,
        size[::-1] if orientation in SIDEWAYS else size,
        "its image",
        remedy="prepare the data set again",
        palette=palette,
    )
    ids = turn_upright(ids, orientation)
    found = np.unique(ids)
    wrong = found[((found >= num_classes) | (found < 0)) & (found != ignore_label)]
    if len(wrong):
        remedy = "prepare the data set again"
        if wrong.tolist() == [num_classes]:  # ids from 1, and perhaps 0 for background
            remedy = f"if its ids begin at 1, subtract 1 and write {ignore_label} for background"
        raise ReclipError(
            f"label {path} has id {wrong[0]}, but the classes are 0 to {num_classes - 1} and {ignore_label} is"
            f" ignored: {remedy}"
        )
    return ids


def label_palette(metadata: Metadata) -> Palette:
    """What the colours of a data set's palette labels mean: ``reclip_label_palette`` of its metadata.

    Without it, ``stuff_colors`` can only confirm that indices are ids, since labels need not use these colours.
    """
    colors = {k: tuple(map(int, color)) for k, color in enumerate(metadata.get("stuff_colors") or ())}
    return metadata.get("reclip_label_palette") or Palette(colors, ignore_label=metadata.get("ignore_label", 255))


def check_no_background(dataset_name: str, user: str) -> None:
    """Raise :class:`ReclipError` if label ids are not the model's classes, as with queries or background names that
    share one id.

    Args:
        user: name of what needs a label id for each class, for the error.
    """
    if DatasetLabels(dataset_name).class_names != list(MetadataCatalog.get(dataset_name).stuff_classes):
        raise ReclipError(
            f"{user} needs a label id for each class, but queries or background names of {dataset_name} share one:"
            " remove semicolons and the background: line from the class file"
        )


class DatasetLabels:
    """The labels of a registered data set.

    Attributes:
        class_names: names of the label ids: the model's classes, unless the metadata has ``reclip_label_ids`` (the
            label id of each of the model's classes), which may merge some.
        ignore_label: id of pixels that do not count.
    """

    def __init__(self, dataset_name: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.class_names: list[str] = list(metadata.get("reclip_label_classes") or metadata.stuff_classes)
        self.ignore_label: int = metadata.ignore_label
        self._palette = label_palette(metadata)
        ids = metadata.get("reclip_label_ids")
        self._ids = None if ids is None else np.asarray(ids, dtype=np.int64)

    @property
    def num_classes(self) -> int:
        """Number of label ids, without the ignored one."""
        return len(self.class_names)

    def read(self, record: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """Label map ``(H, W)`` of a record, upright; see :func:`read_label_file`.

        Args:
            record: with ``sem_seg_file_name``, and ``sem_seg_orientation`` (EXIF) if the label is not upright.
            size: (H, W) of the upright image.
        """
        return read_label_file(
            record["sem_seg_file_name"],
            self.num_classes,
            self.ignore_label,
            size,
            self._palette,
            record.get("sem_seg_orientation", 1),
        )

    def predicted_ids(self, prediction: np.ndarray) -> np.ndarray:
        """Label ids of a map ``(H, W)`` of the model's classes."""
        return prediction if self._ids is None else self._ids[prediction]
