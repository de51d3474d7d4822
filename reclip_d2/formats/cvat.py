"""CVAT's Segmentation Mask 1.1: https://docs.cvat.ai/docs/dataset_management/formats/format-smask."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MaskClasses, distinct_colors
from reclip_d2.formats.pictures import png_bytes
from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.writer import Spool, Writer
from reclip_d2.utils.io import atomic_write

ARCHIVE = "segmentation_mask_1.1.zip"
BACKGROUND = "background"  # CVAT's name of black
_BLACK = (0, 0, 0)
_MAX_INSTANCES = 255
_CLASS_FOLDER, _OBJECT_FOLDER = "SegmentationClass", "SegmentationObject"


class CvatWriter(Writer):
    """``cvat``: ``segmentation_mask_1.1.zip``, for a task with these images, whose labels have the classes' names.

    ``SegmentationClass`` has the classes' colours (moved to the next free one where two are equal or black),
    ``SegmentationObject`` one object per class and image, in Pascal VOC's colours. Ignored pixels and the background,
    as well as a class called ``background``, are black in both: CVAT leaves them unannotated.
    """

    whole_set: ClassVar[bool] = True

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        super().__init__(output, classes)
        self._annotated = [k for k in classes.annotated if classes.names[k] != BACKGROUND]
        colors = distinct_colors([classes.colors[k] for k in self._annotated], {_BLACK})
        self._colors = dict(zip(self._annotated, colors, strict=True))
        self._table = np.zeros((classes.ignore_label + 1, 3), dtype=np.uint8)
        self._table[self._annotated] = np.reshape(colors, (-1, 3))
        self._pngs = {folder: Spool(self.output) for folder in (_CLASS_FOLDER, _OBJECT_FOLDER)}

    @classmethod
    def check_classes(cls, classes: MaskClasses) -> None:
        """Raise :class:`ReclipError` for names that would break ``labelmap.txt``, which has one ``name:colour::`` per
        line."""
        for name in classes.names:
            if ":" in name or name.startswith("#"):
                raise ReclipError(
                    f"class name {name!r} cannot be written to CVAT's label map, where ':' separates and '#' begins a"
                    " comment: rename the class, or omit the format cvat"
                )

    @classmethod
    def check_path(cls, path: PurePosixPath) -> None:
        """Raise :class:`ReclipError` for names that would break ``default.txt``, which has one name without extension
        per line."""
        name = str(path.with_suffix(""))
        if name.startswith("#") or name != name.strip():  # spaces of all kinds, which the reader strips
            raise ReclipError(
                f"image name {str(path)!r} cannot be written to CVAT's image list, where '#' begins a comment and"
                " spaces at the ends are stripped: rename the image, or omit the format cvat"
            )

    def close(self) -> None:
        """Free the spools."""
        for spool in self._pngs.values():
            spool.close()

    def _add(self, prediction: Prediction) -> None:
        path = prediction.path
        present = [s.label for s in prediction.segments if s.label in self._colors]
        if len(present) > _MAX_INSTANCES:
            raise ReclipError(f"image {path} has {len(present)} classes, CVAT allows {_MAX_INSTANCES}: omit cvat")
        objects = np.zeros_like(self._table)
        for number, label in enumerate(present, start=1):
            objects[label] = voc_color(number)
        name = str(path.with_suffix(""))
        self._pngs[_CLASS_FOLDER].put(name, png_bytes(self._table[prediction.labels]))
        self._pngs[_OBJECT_FOLDER].put(name, png_bytes(objects[prediction.labels]))

    def finish(self) -> None:
        """Write the archive."""
        colors = {BACKGROUND: _BLACK, **{self.classes.names[k]: color for k, color in self._colors.items()}}
        labelmap = ["# label:color_rgb:parts:actions", *(f"{name}:{r},{g},{b}::" for name, (r, g, b) in colors.items())]
        with (
            atomic_write(self.output / ARCHIVE) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
        ):
            _store(archive, "labelmap.txt", _lines(labelmap))
            _store(archive, "ImageSets/Segmentation/default.txt", _lines(self._pngs[_CLASS_FOLDER].keys()))
            for folder, spool in self._pngs.items():
                for name, data in spool.items():
                    _store(archive, f"{folder}/{name}.png", data)


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a member without a timestamp, so that equal content gives equal archives."""
    member = zipfile.ZipInfo(name)  # of 1 January 1980, uncompressed: PNGs are compressed already
    member.create_system = 3
    member.external_attr = 0o644 << 16
    archive.writestr(member, data)


def voc_color(number: int) -> tuple[int, int, int]:
    """Colour of an object number in Pascal VOC's colour map: its bits, three at a time, from the top bit down."""
    color = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            color[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return tuple(color)
