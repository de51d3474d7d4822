"""A user's own labels as the data set ``custom_val``: for evaluation, never for training.

``DATASETS.CUSTOM.LABELS`` is a folder of index PNGs that mirrors the images: the label of ``street/a.jpg`` is
``street/a.png``. Ids are those of the class file, from 0; 255 is ignored. With background names, the id after the last
class stands for all of them, as in masks of ``--background keep``.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.class_file import IGNORE_LABEL, ClassList
from reclip_d2.data.colors import class_colors
from reclip_d2.data.datasets.label_orientation import OrientationCounts, check_label_size, label_turn
from reclip_d2.data.datasets.registration import scan_ids
from reclip_d2.data.image_folder import ImageFile, find_images
from reclip_d2.data.images import read_geometry
from reclip_d2.data.index_images import Palette, index_size
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)

CUSTOM_VAL = "custom_val"
_SUFFIX = ".png"


def register_labelled(images: str, labels: str, classes: ClassList) -> None:
    """Register ``custom_val``, in place of any earlier one. Labels are opened lazily.

    Args:
        images: ``DATASETS.CUSTOM.IMAGES``.
        labels: ``DATASETS.CUSTOM.LABELS``.

    Raises:
        ReclipError: ``labels`` is not a folder.
    """
    folder = Path(labels).expanduser()
    if not folder.is_dir():
        raise ReclipError(f"DATASETS.CUSTOM.LABELS {labels} is not a folder: name the folder of the index PNGs")
    for catalog in (DatasetCatalog, MetadataCatalog):
        if CUSTOM_VAL in catalog.list():
            catalog.remove(CUSTOM_VAL)
    find = functools.cache(lambda: labelled_records(images, folder))  # called several times per evaluation
    DatasetCatalog.register(CUSTOM_VAL, lambda: [dict(record) for record in find()])
    names, label_names = classes.model_classes, classes.mask_names(keep_background=True)
    MetadataCatalog.get(CUSTOM_VAL).set(
        stuff_classes=[synonyms[0] for synonyms in names],
        stuff_class_synonyms=names,
        stuff_colors=class_colors(len(names)).tolist(),
        ignore_label=IGNORE_LABEL,
        evaluator_type="sem_seg",
        reclip_protocol=f"{CUSTOM_VAL}: own labels, {len(label_names)} classes; mIoU over the classes that occur",
        reclip_own_labels=True,
        reclip_label_classes=label_names,
        reclip_label_ids=classes.mask_ids(keep_background=True),
        # All 256 ids, so that the error for an id beyond the classes can name it.
        reclip_label_palette=Palette({k: tuple(color) for k, color in enumerate(class_colors(IGNORE_LABEL).tolist())}),
    )


def labelled_records(images: str, folder: Path) -> list[dict[str, Any]]:
    """Records of the images that have a label: ``file_name``, ``image_id``, ``sem_seg_file_name`` and, if the label
    must be rotated with its image, ``sem_seg_orientation``. The log counts what is left out.

    Raises:
        ReclipError: no image has a label, sizes differ, or it is ambiguous what labels are drawn on.
    """
    found = find_images([images], exclude=[folder]).images
    names = set(scan_ids(folder, _SUFFIX))
    labelled = [image for image in found if image.image_id in names]
    if not labelled:
        raise ReclipError(
            f"no image of DATASETS.CUSTOM.IMAGES {images} has a label in DATASETS.CUSTOM.LABELS {folder}: the label of"
            f" {found[0].name} is {found[0].image_id}{_SUFFIX}"
        )
    without, orphans = len(found) - len(labelled), sorted(names - {image.image_id for image in labelled})
    if without:
        logger.info("%s: %d images without a label are left out", CUSTOM_VAL, without)
    if orphans:
        logger.warning("%s: %d labels have no image, first %s%s", CUSTOM_VAL, len(orphans), orphans[0], _SUFFIX)
    orientations = _orientations(labelled, folder)
    records = []
    for image in labelled:
        record = {
            "file_name": str(image.path),
            "image_id": str(image.name),
            "sem_seg_file_name": str(folder / f"{image.image_id}{_SUFFIX}"),
        }
        if image in orientations:
            record["sem_seg_orientation"] = orientations[image]
        records.append(record)
    return records


def _orientations(images: list[ImageFile], folder: Path) -> dict[ImageFile, int]:
    """EXIF orientations of the labels that must be rotated, by path."""
    counts, lying = OrientationCounts(), []
    for image in images:
        geometry = read_geometry(image.path)
        if geometry.orientation != 1:
            path = folder / f"{image.image_id}{_SUFFIX}"
            size = index_size(path)
            check_label_size(f"label {path}", size, image.path, geometry)
            counts.count(geometry, size)
            lying.append((image, geometry, size))
    # Today's annotation programs show images upright, and our masks are upright too.
    drawn_on = counts.drawn_on(CUSTOM_VAL, "upright", None, "save all labels upright, as viewers show their images")
    if lying:
        logger.info("%s: %s", CUSTOM_VAL, counts.describe(drawn_on))
    turns = {image: label_turn(geometry, size, drawn_on) for image, geometry, size in lying}
    logger.debug("%s: orientations of labels: %s", CUSTOM_VAL, Counter(turns.values()))
    return {image: orientation for image, orientation in turns.items() if orientation != 1}
