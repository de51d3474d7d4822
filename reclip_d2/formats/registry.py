"""The registry of formats by name.

Modules are loaded on first use, so that ``reclip --help`` lists the formats quickly.
"""

from __future__ import annotations

import importlib
from collections import UserDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reclip_d2.formats.writer import Writer


class Formats(UserDict[str, "type[Writer]"]):
    """Writers by the name of their format; ``"module:Class"``, in this package, is imported on first use."""

    def __getitem__(self, name: str) -> type[Writer]:
        found = super().__getitem__(name)
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self[name] = getattr(importlib.import_module(f"reclip_d2.formats.{module}"), attribute)
        return found


FORMATS = Formats(
    {
        "index": "pictures:IndexWriter",
        "palette": "pictures:PaletteWriter",
        "overlay": "pictures:OverlayWriter",
        "scores": "pictures:ScoresWriter",
        "cvat": "cvat:CvatWriter",
        "labelstudio": "label_studio:LabelStudioWriter",
        "coco": "coco:CocoWriter",
        "coco_panoptic": "coco:CocoPanopticWriter",
        "yolo": "yolo:YoloWriter",
        "fiftyone": "fiftyone:FiftyOneWriter",
        "datumaro": "datumaro:DatumaroWriter",
    }
)
