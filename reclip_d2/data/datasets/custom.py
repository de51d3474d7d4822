"""A user's own images as the data set ``custom``: images and a class file, no labels.

It is defined by ``DATASETS.CUSTOM.IMAGES`` and ``DATASETS.CUSTOM.CLASSES``, so it is registered per config
(:func:`register_custom`), not on import. With ``DATASETS.CUSTOM.LABELS`` the labelled images are also registered as
``custom_val``, see :mod:`reclip_d2.data.datasets.custom_labels`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.class_file import ClassList, read_class_file
from reclip_d2.data.colors import class_colors
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL, register_labelled
from reclip_d2.data.datasets.vocabulary import register_vocabulary
from reclip_d2.data.image_folder import find_images
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)

CUSTOM = "custom"


def register_custom(cfg: CfgNode) -> None:
    """Register ``custom`` and ``custom_val`` if the config names them, and other data sets under the names of
    ``DATASETS.VOCABULARY``; images are listed lazily.

    With ``DATASETS.CUSTOM.LABELS`` an empty ``DATASETS.TEST`` becomes ``custom_val``.

    Raises:
        ReclipError: a key is empty, the class file is wrong, or ``custom_val`` is trained on.
    """
    register_vocabulary(cfg)
    keys = cfg.DATASETS.CUSTOM
    if keys.LABELS and not cfg.DATASETS.TEST and CUSTOM in cfg.DATASETS.TRAIN:
        cfg.DATASETS.TEST = (CUSTOM_VAL,)
    if not {CUSTOM, CUSTOM_VAL} & {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        return
    if CUSTOM_VAL in cfg.DATASETS.TRAIN:
        raise ReclipError(f"{CUSTOM_VAL} in DATASETS.TRAIN has labels, which training never reads: name {CUSTOM}")
    if not keys.IMAGES or not keys.CLASSES:
        raise ReclipError(
            "DATASETS.CUSTOM.IMAGES or DATASETS.CUSTOM.CLASSES is empty: name your images (a folder, an image, a glob"
            " or a .txt list) and your class file"
        )
    classes = read_class_file(keys.CLASSES)
    register_images([], classes)
    DatasetCatalog.remove(CUSTOM)
    labels = [Path(keys.LABELS).expanduser()] if keys.LABELS else []  # may be below the images, but are not images
    DatasetCatalog.register(CUSTOM, lambda: _records_of(keys.IMAGES, labels))
    if CUSTOM_VAL in cfg.DATASETS.TEST:
        if not keys.LABELS:
            raise ReclipError("DATASETS.CUSTOM.LABELS is empty: name the folder of your labels, index PNGs")
        register_labelled(keys.IMAGES, keys.LABELS, classes)


def register_images(records: Sequence[dict[str, Any]], classes: ClassList) -> None:
    """Register records (``file_name`` and ``image_id``) and classes as ``custom``, in place of any earlier ones."""
    if CUSTOM in DatasetCatalog.list():
        DatasetCatalog.remove(CUSTOM)
    if CUSTOM in MetadataCatalog.list():
        MetadataCatalog.remove(CUSTOM)
    names = classes.model_classes
    DatasetCatalog.register(CUSTOM, lambda: [dict(record) for record in records])
    MetadataCatalog.get(CUSTOM).set(
        stuff_classes=[synonyms[0] for synonyms in names],
        stuff_class_synonyms=names,
        stuff_colors=class_colors(len(names)).tolist(),
        ignore_label=255,
        evaluator_type="sem_seg",
        reclip_protocol=f"custom: own images, {len(names)} classes, no labels",
    )


def _records_of(images: str, exclude: Sequence[Path]) -> list[dict[str, Any]]:
    found = find_images([images], exclude)
    if found.left_out:
        logger.info("%s: %s", CUSTOM, found.left_out)
    return [{"file_name": str(image.path), "image_id": str(image.name)} for image in found.images]
