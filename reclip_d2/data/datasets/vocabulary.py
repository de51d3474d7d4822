"""Other names for the classes of a registered data set: ``DATASETS.VOCABULARY``.

A class file (:mod:`reclip_d2.data.class_file`) whose classes are those of the data set, in its order, under other
names: with synonyms, with several queries of a class, and with names of what else may be seen. Images and labels stay
the same, and scores are those of the data set's classes.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.class_file import ClassList, read_class_file
from reclip_d2.data.classes import check_registered
from reclip_d2.data.colors import class_colors
from reclip_d2.data.index_images import Palette
from reclip_d2.errors import ReclipError

SUFFIX = "_vocabulary"
"""``voc20_val`` under other names is registered as ``voc20_val_vocabulary``."""


def register_vocabulary(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` under the names of ``DATASETS.VOCABULARY``,
    and replace them in the config.

    Raises:
        ReclipError: the class file is wrong, or has not one class for each of a data set's.
    """
    if not cfg.DATASETS.VOCABULARY:
        return
    classes = read_class_file(cfg.DATASETS.VOCABULARY, "DATASETS.VOCABULARY")
    for key in ("TRAIN", "TEST"):
        # A config that a run has written has them replaced already.
        own = [name.removesuffix(SUFFIX) for name in cfg.DATASETS[key]]
        cfg.DATASETS[key] = tuple(_register(name, classes) for name in own)


def _register(name: str, classes: ClassList) -> str:
    """Register a data set under other names; returns its new name."""
    check_registered(name)
    metadata = MetadataCatalog.get(name).as_dict()
    if "reclip_label_ids" in metadata or name == "custom":
        raise ReclipError(
            f"DATASETS.VOCABULARY is not for {name}, whose names are in DATASETS.CUSTOM.CLASSES: write them there"
        )
    own = list(metadata["stuff_classes"])
    if len(classes.classes) != len(own):
        raise ReclipError(
            f"DATASETS.VOCABULARY {classes.path} has {len(classes.classes)} classes, but {name} has {len(own)}: write"
            f" one line for each, in this order: {', '.join(own)}"
        )
    renamed = name + SUFFIX
    for catalog in (DatasetCatalog, MetadataCatalog):
        if renamed in catalog.list():
            catalog.remove(renamed)
    DatasetCatalog.register(renamed, lambda: DatasetCatalog.get(name))
    colors = [list(map(int, color)) for color in metadata.get("stuff_colors") or class_colors(len(own))]
    palette = Palette({k: tuple(color) for k, color in enumerate(colors)}, ignore_label=metadata["ignore_label"])
    names, ids = classes.model_classes, classes.mask_ids(keep_background=True)
    MetadataCatalog.get(renamed).set(
        **{key: value for key, value in metadata.items() if not key.startswith("stuff_") and key != "name"}
    )
    MetadataCatalog.get(renamed).set(
        stuff_classes=[synonyms[0] for synonyms in names],
        stuff_class_synonyms=names,
        stuff_colors=[colors[k] if k < len(own) else [0, 0, 0] for k in ids],
        # Scores have the data set's own names.
        reclip_label_classes=[*own, *(["background"] if classes.background else [])],
        reclip_label_ids=ids,
    )
    if "reclip_label_palette" not in metadata:
        MetadataCatalog.get(renamed).set(reclip_label_palette=palette)
    return renamed
