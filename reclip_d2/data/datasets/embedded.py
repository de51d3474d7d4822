"""Registration of the embedded data set: ``embedded_train``, ``embedded_dev``, ``embedded_val``.

Lazy: the files are made when a data set is first asked for, under ``$DETECTRON2_DATASETS/embedded``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.datasets.registration import datasets_root
from reclip_d2.data.embedded import EMBEDDED_CLASSES, EMBEDDED_COLORS, ensure_dataset, list_split

PROTOCOL = "embedded: 12 materials, every pixel labelled, 96 x 96 px; mIoU over the classes that occur"


def embedded_root() -> Path:
    """``$DETECTRON2_DATASETS/embedded``, by default ``datasets/embedded``."""
    return datasets_root() / "embedded"


def load_embedded(split: str, with_labels: bool) -> list[dict[str, Any]]:
    """Records of a split; without labels for training, so that nothing downstream can open one."""
    root = ensure_dataset(embedded_root())
    records = list_split(root, split)
    if not with_labels:
        for record in records:
            del record["sem_seg_file_name"]
    return records


def register_embedded() -> None:
    """Register the three splits. ``embedded_dev`` is for choosing, ``embedded_val`` for reporting only.
    ``embedded_train_labelled`` is the training split once more, for linear probing."""
    for split, with_labels in (("train", False), ("train", True), ("dev", True), ("val", True)):
        name = "embedded_train_labelled" if split == "train" and with_labels else f"embedded_{split}"
        DatasetCatalog.register(name, lambda split=split, labels=with_labels: load_embedded(split, labels))
        MetadataCatalog.get(name).set(
            stuff_classes=list(EMBEDDED_CLASSES),
            stuff_colors=[list(color) for color in EMBEDDED_COLORS],
            ignore_label=255,
            evaluator_type="sem_seg",
            reclip_protocol=PROTOCOL,
        )


register_embedded()
