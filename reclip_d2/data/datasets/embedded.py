"""Registration of the embedded data sets: ``embedded_{train,dev,val}`` and ``embedded_longtail_{train,dev,val}``.

The files are made under ``$DETECTRON2_DATASETS`` when a data set is first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.datasets.registration import datasets_root
from reclip_d2.toy import EMBEDDED_CLASSES, EMBEDDED_COLORS, WORLDS, World, ensure_dataset, list_split

PROTOCOL = "12 materials, every pixel labelled, 96 x 96 px; mIoU over the classes that occur"


def embedded_root(world: World) -> Path:
    """Folder of a world's data set in ``$DETECTRON2_DATASETS`` (default: ``datasets``)."""
    return datasets_root() / world.name


def load_embedded(world: World, split: str, with_labels: bool) -> list[dict[str, Any]]:
    """Records of a split; training records have no labels, so nothing downstream can open one."""
    root = ensure_dataset(embedded_root(world), world)
    records = list_split(root, split, world)
    if not with_labels:
        for record in records:
            del record["sem_seg_file_name"]
    return records


def register_embedded(world: World) -> None:
    """Register the three splits: ``dev`` is for model selection, ``val`` for reporting only.

    ``train_labelled`` is the training split with labels, for linear probing.
    """
    for split, with_labels in (("train", False), ("train", True), ("dev", True), ("val", True)):
        name = f"{world.name}_{split}" + "_labelled" * (split == "train" and with_labels)
        DatasetCatalog.register(name, lambda split=split, labels=with_labels: load_embedded(world, split, labels))
        MetadataCatalog.get(name).set(
            stuff_classes=list(EMBEDDED_CLASSES),
            stuff_colors=[list(color) for color in EMBEDDED_COLORS],
            ignore_label=255,
            evaluator_type="sem_seg",
            reclip_protocol=f"{world.name}: {PROTOCOL}",
        )


for _world in WORLDS.values():
    register_embedded(_world)
