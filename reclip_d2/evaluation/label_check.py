"""A look at all labels of a user's own data set before a model is evaluated on them."""

from __future__ import annotations

import logging

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.images import read_geometry
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.evaluation.label_maps import check_label_ids

logger = logging.getLogger(__name__)


def check_own_labels(dataset_name: str) -> None:
    """Read all labels that no preparation program has checked (``reclip_own_labels`` in the metadata).

    A wrong label is known before the prediction, and not after hours of it. The classes that occur are said in the log.

    Raises:
        ReclipError: a label is no map of class ids of its image's size, see
            :func:`~reclip_d2.evaluation.label_files.read_label_file`; or all of them look like binary masks.
    """
    if not MetadataCatalog.get(dataset_name).get("reclip_own_labels", False):
        return
    labels, records = DatasetLabels(dataset_name), DatasetCatalog.get(dataset_name)
    found: set[int] = set()
    for record in records:
        found |= set(np.unique(labels.read(record, read_geometry(record["file_name"]).upright)).tolist())
    check_label_ids(found, labels)
    names = [name for k, name in enumerate(labels.class_names) if k in found]
    logger.info("%s: %d labels; classes that occur: %s", dataset_name, len(records), ", ".join(names))
