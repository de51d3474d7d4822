"""Ultralytics YOLO's segmentation labels: https://docs.ultralytics.com/datasets/segment."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import yaml

from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.polygons import polygons
from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.writer import Writer, check_placing, place_image
from reclip_d2.utils.io import atomic_write

DECIMALS = 7


class YoloWriter(Writer):
    """``yolo``: one text file per image in ``labels/``, links to the images in ``images/``, and ``data.yaml``.

    A line is ``class x1 y1 x2 y2 ...``, in fractions of width and height, of one region: the pixels of a class that
    are connected by their sides. A class in several parts becomes several lines, which YOLO reads as separate objects.
    Holes are cut out through a slit (:mod:`reclip_d2.formats.polygons`); nothing is smoothed or dropped, not even
    one-pixel regions. The polygons run along the pixels' edges, from 0 to 1 over a full image. Ignored pixels and the
    background have no line. An image without lines has an empty file, as YOLO expects.

    ``data.yaml`` names all images for training and validation: split them before you train.
    """

    def __init__(self, output: Path, classes: MaskClasses, *, images: str = "link") -> None:
        """
        Args:
            images: how images are placed in ``images/``, where YOLO looks for them: ``link`` (symbolic links), ``copy``
                or ``none``.
        """
        super().__init__(output, classes)
        check_placing("yolo", images)
        self._images = images

    def files(self, path: PurePosixPath) -> list[Path]:
        """The labels."""
        return [self.output / "labels" / path.with_suffix(".txt")]

    def _add(self, prediction: Prediction) -> None:
        if prediction.source is not None:
            place_image(prediction.source, self.output / "images" / prediction.path, self._images)
        size = np.array(prediction.size[::-1])
        lines = [
            " ".join([str(label), *map(_number, (polygon / size).ravel().tolist())])
            for label, regions in polygons(prediction.labels, self.classes.annotated)
            for polygon in regions
        ]
        with atomic_write(self.files(prediction.path)[0]) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")

    def finish(self) -> None:
        """Write ``data.yaml``."""
        # Without "path", YOLO uses the file's folder.
        content = {"train": "images", "val": "images", "names": dict(enumerate(self.classes.names))}
        with atomic_write(self.output / "data.yaml") as temporary:
            text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
            temporary.write_text("# Both sets contain all images: split them before you train.\n" + text, "utf-8")


def _number(value: float) -> str:
    return f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".") or "0"
