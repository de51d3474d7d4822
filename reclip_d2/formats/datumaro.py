"""Datumaro's own format: https://github.com/open-edge-platform/datumaro, version 1.0 of its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.writer import RecordsWriter, write_json_arrays
from reclip_d2.utils.io import atomic_write

MEDIA_TYPE_IMAGE = 2


class DatumaroWriter(RecordsWriter):
    """``datumaro``: ``annotations/default.json``, one RLE mask per class and image.

    Labels and colours are those of the classes, the background among them; ignored pixels have no annotation. Each mask
    is a group, so that its parts stay together where a tool makes polygons of them, as CVAT does by default. Datumaro
    looks for images in ``images/default``, and does not follow links out of the folder: copy the images there if it
    needs them.
    """

    def _add(self, prediction: Prediction) -> None:
        segments = [[s.label, s.counts] for s in prediction.segments if s.label < len(self.classes.names)]
        self._records.put_record(str(prediction.path), {"size": prediction.size, "segments": segments})

    def finish(self) -> None:
        """Write the JSON."""
        names, colors = self.classes.names, self.classes.colors
        labels = [{"name": name, "parent": "", "attributes": []} for name in names]
        colormap = [{"label_id": k, "r": r, "g": g, "b": b} for k, (r, g, b) in enumerate(colors)]
        head = {
            "dm_format_version": "1.0",
            "media_type": MEDIA_TYPE_IMAGE,
            "infos": {},
            "categories": {"label": {"labels": labels, "attributes": []}, "mask": {"colormap": colormap}},
        }
        path = self.output / "annotations" / "default.json"
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
            write_json_arrays(out, head, {"items": self._items()})

    def _items(self) -> Iterator[dict[str, Any]]:
        for path, record in self._records.records():
            annotations = [
                {
                    "id": number,
                    "type": "mask",
                    "attributes": {},
                    "group": number + 1,
                    "label_id": label,
                    "rle": {"counts": counts, "size": record["size"]},
                    "z_order": 0,
                }
                for number, (label, counts) in enumerate(record["segments"])
            ]
            yield {
                "id": str(PurePosixPath(path).with_suffix("")),
                "annotations": annotations,
                "image": {"path": path, "size": record["size"]},
            }
