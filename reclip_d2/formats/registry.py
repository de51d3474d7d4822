"""The formats by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.coco import CocoPanopticWriter, CocoWriter
from reclip_d2.formats.cvat import CvatWriter
from reclip_d2.formats.datumaro import DatumaroWriter
from reclip_d2.formats.fiftyone import FiftyOneWriter
from reclip_d2.formats.label_studio import LabelStudioWriter
from reclip_d2.formats.pictures import IndexWriter, OverlayWriter, PaletteWriter, ScoresWriter
from reclip_d2.formats.prediction import check_paths
from reclip_d2.formats.writer import Writer
from reclip_d2.formats.yolo import YoloWriter

FORMATS: dict[str, type[Writer]] = {
    "index": IndexWriter,
    "palette": PaletteWriter,
    "overlay": OverlayWriter,
    "scores": ScoresWriter,
    "cvat": CvatWriter,
    "labelstudio": LabelStudioWriter,
    "coco": CocoWriter,
    "coco_panoptic": CocoPanopticWriter,
    "yolo": YoloWriter,
    "fiftyone": FiftyOneWriter,
    "datumaro": DatumaroWriter,
}


def check_formats(names: Iterable[str], classes: MaskClasses) -> None:
    """Raise :class:`ReclipError` for an unknown format, or one that cannot hold these classes.

    For the start of a run: so nobody learns after hours of prediction that a format is refused.
    """
    for name in names:
        if name not in FORMATS:
            raise ReclipError(f"format {name!r} is unknown: choose from {', '.join(FORMATS)}")
        FORMATS[name].check_classes(classes)


def check_names(formats: Iterable[str], paths: Iterable[PurePosixPath]) -> None:
    """Raise :class:`ReclipError` if the name of an image cannot be written, in one of these formats or in any.

    For the start of a run, as :func:`check_formats`, which knows the formats.

    Args:
        paths: of all images, relative; see :func:`check_paths`.
    """
    paths = list(paths)
    check_paths(paths)
    for name in formats:
        for path in paths:
            FORMATS[name].check_path(path)
