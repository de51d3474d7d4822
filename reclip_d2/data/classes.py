"""The class list of a registered data set."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.images import log_alpha
from reclip_d2.errors import ReclipError


def check_registered(name: str) -> None:
    """Raise :class:`ReclipError` for a data set that is not registered."""
    if name not in DatasetCatalog.list():
        known = ", ".join(n for n in DatasetCatalog.list() if hasattr(MetadataCatalog.get(n), "reclip_protocol"))
        raise ReclipError(f"data set {name!r} is not registered: choose one of {known}")


def check_labelled(name: str) -> None:
    """Raise :class:`ReclipError` for a data set that is not registered or has no labels to evaluate with."""
    check_registered(name)
    records = DatasetCatalog.get(name)
    if not records:
        raise ReclipError(f"data set {name!r} has no images: check its folder")
    if not all("sem_seg_file_name" in record for record in records):
        raise ReclipError(f"data set {name!r} has no labels to evaluate with: name another in DATASETS.TEST")
    log_alpha(name, (record["file_name"] for record in records))


def class_names_of(dataset: str) -> list[list[str]]:
    """Name and synonyms of each class of a data set: ``stuff_class_synonyms`` of its metadata (lists that begin with
    the name) if present, otherwise ``stuff_classes``."""
    check_registered(dataset)
    metadata = MetadataCatalog.get(dataset)
    if hasattr(metadata, "stuff_class_synonyms"):
        return [list(names) for names in metadata.stuff_class_synonyms]
    return [[name] for name in metadata.get("stuff_classes", [])]


def class_names_from_config(cfg: CfgNode) -> list[list[str]]:
    """The class list of the config's first data set, training before test.

    Raises:
        ReclipError: there is none, or two of them have different class lists.
    """
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not datasets:
        raise ReclipError("DATASETS.TRAIN and DATASETS.TEST are empty: name a registered data set")
    names = class_names_of(datasets[0])
    for other in datasets[1:]:
        if class_names_of(other) != names:
            raise ReclipError(f"data sets {datasets[0]!r} and {other!r} have different class lists")
    return names
