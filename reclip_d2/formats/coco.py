"""COCO: run-length encoded masks, and panoptic PNGs.

Both follow https://cocodataset.org/#format-data, with COCO's file names, for a subset called ``default``. The category
id of class ``k`` is ``k + 1``: COCO's ids begin at 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.pictures import write_png
from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.writer import RecordsWriter, write_json_arrays
from reclip_d2.utils.io import atomic_write

DESCRIPTION = "Semantic segmentation by reclip_d2"


def _image(number: int, path: str, record: dict[str, Any]) -> dict[str, Any]:
    return {"id": number, "file_name": path, "height": record["height"], "width": record["width"]}


class _CocoWriter(RecordsWriter):
    """Spools one record per image; image ids count from 1 in the order of the paths."""

    def _spool(self, prediction: Prediction, labels: list[int], *, counts: bool) -> None:
        found = [segment for segment in prediction.segments if segment.label in labels]
        record = {
            "height": prediction.size[0],
            "width": prediction.size[1],
            "segments": [[s.label, s.area, s.bbox, *([s.counts] if counts else [])] for s in found],
        }
        self._records.put_record(str(prediction.path), record)

    def _images(self) -> Iterator[dict[str, Any]]:
        for number, (path, record) in enumerate(self._records.records(), start=1):
            yield _image(number, path, record)


class CocoWriter(_CocoWriter):
    """``coco``: ``annotations/instances_default.json``, one annotation per class and image, as for instances.

    ``segmentation`` is compressed RLE and ``iscrowd`` 0. Ignored pixels and the background have no annotation, but
    the background is a category.
    """

    def _add(self, prediction: Prediction) -> None:
        self._spool(prediction, self.classes.annotated, counts=True)

    def finish(self) -> None:
        """Write the JSON."""
        categories = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(self.classes.names)]
        head = {"info": {"description": DESCRIPTION}, "licenses": [], "categories": categories}
        with (
            atomic_write(self.output / "annotations" / "instances_default.json") as temporary,
            open(temporary, "w", encoding="utf-8") as out,
        ):
            write_json_arrays(out, head, {"images": self._images(), "annotations": self._annotations()})

    def _annotations(self) -> Iterator[dict[str, Any]]:
        identity = 0
        for number, (_, record) in enumerate(self._records.records(), start=1):
            for label, area, box, counts in record["segments"]:
                identity += 1
                yield {
                    "id": identity,
                    "image_id": number,
                    "category_id": label + 1,
                    "segmentation": {"size": [record["height"], record["width"]], "counts": counts},
                    "area": area,
                    "bbox": box,
                    "iscrowd": 0,
                }


class CocoPanopticWriter(_CocoWriter):
    """``coco_panoptic``: ``annotations/panoptic_default.json``, with RGB PNGs in ``panoptic_default/``.

    A pixel's R + 256 G + 65536 B is its segment's id, which is the category id (one segment per class and image); 0
    (COCO's VOID) is ignored. All classes, the background among them, are stuff (``isthing`` 0).
    """

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        super().__init__(output, classes)
        ids = np.arange(1, classes.ignore_label + 2, dtype=np.uint32)
        ids[len(classes.names) :] = 0
        self._table = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=1).astype(np.uint8)

    def _add(self, prediction: Prediction) -> None:
        write_png(
            self.output / "annotations" / "panoptic_default" / prediction.path.with_suffix(".png"),
            self._table[prediction.labels],
        )
        self._spool(prediction, list(range(len(self.classes.names))), counts=False)

    def finish(self) -> None:
        """Write the JSON."""
        categories = [
            {"id": k + 1, "name": name, "supercategory": "", "isthing": 0, "color": list(color)}
            for k, (name, color) in enumerate(zip(self.classes.names, self.classes.colors, strict=True))
        ]
        head = {"info": {"description": DESCRIPTION}, "licenses": [], "categories": categories}
        with (
            atomic_write(self.output / "annotations" / "panoptic_default.json") as temporary,
            open(temporary, "w", encoding="utf-8") as out,
        ):
            write_json_arrays(out, head, {"images": self._images(), "annotations": self._annotations()})

    def _annotations(self) -> Iterator[dict[str, Any]]:
        for number, (path, record) in enumerate(self._records.records(), start=1):
            segments_info = [
                {"id": label + 1, "category_id": label + 1, "area": area, "bbox": box, "iscrowd": 0}
                for label, area, box in record["segments"]
            ]
            yield {
                "image_id": number,
                "file_name": str(Path(path).with_suffix(".png")),
                "segments_info": segments_info,
            }
