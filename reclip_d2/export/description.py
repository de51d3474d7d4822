"""The description of an exported file: ``classes.json`` next to it and inside it.

It is the file of index masks (:mod:`reclip_d2.formats.classes`) with one more key, ``files``::

    {"ignore_label": 255, "background": null, "classes": [{"id": 0, "name": "sky", "color": [..]}, ...],
     "files": {"student.onnx": {"format": "onnx", "model": "student", "input": {...}, "output": {...}}}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reclip_d2.errors import ReclipError
from reclip_d2.export.export import ExportOptions
from reclip_d2.export.int8 import Int8Options
from reclip_d2.export.onnx_file import INPUT, output_name
from reclip_d2.formats import MaskClasses
from reclip_d2.formats.classes import CLASSES_FILE
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json

_SCHEMA = {
    "type": "object",
    "required": ["classes"],
    "properties": {
        "classes": {"type": "array"},
        "files": {"type": "object", "additionalProperties": {"type": "object"}},
    },
}


@dataclasses.dataclass(frozen=True)
class DescribedFile:
    """An exported file and its entry in ``classes.json``.

    Attributes:
        path: path of the exported file.
        classes: classes of the label ids.
        channels: label id of each channel of the logits (each class of the model); ignored classes have the ignore
            label, and background names may share an id.
        model: kind of model.
        options: export options.
        short_side, long_side: size in pixels to which the model's own prediction resizes images: the short side, and
            the maximum of the long side; 0 for no resize.
        calibration_images: number of images that an INT8 file was calibrated on.
    """

    path: Path
    classes: MaskClasses
    channels: Sequence[int]
    model: str
    options: ExportOptions
    short_side: int = 0
    long_side: int = 0
    calibration_images: int = 0

    def content(self) -> dict[str, Any]:
        """``classes.json`` for this file only."""
        options = self.options
        sides: list[Any] = ["height", "width"] if options.size is None else list(options.size)
        ids = {"channels": list(self.channels)}
        wide = max(self.channels) > 255
        entry = {
            "format": options.format,
            "model": self.model,
            "input": {
                "name": INPUT,
                "type": options.input_type if options.format == "onnx" else "uint8 or float32",
                "shape": [1, 3, *sides],
                "pixels": "RGB, 0 to 255, upright; normalisation and padding are in the graph",
                "resize_short_side_to": self.short_side or None,
                "long_side_at_most": (self.long_side or None) if self.short_side else None,
            },
            "output": {
                "name": output_name(options.labels),
                "type": ("int32" if wide else "uint8") if options.labels else "float32",
                "shape": [1, *sides] if options.labels else [1, len(self.channels), *sides],
                **({} if options.labels else ids),
            },
            **({} if options.int8 is None else {"int8": self._quantisation(options.int8)}),
        }
        return {**json.loads(self.classes.to_json()), "files": {self.path.name: entry}}

    def _quantisation(self, options: Int8Options) -> dict[str, Any]:
        """How an INT8 file was calibrated."""
        return {
            "calibration": options.method,
            "calibration_images": self.calibration_images,
            "weight_bits": 7 if options.reduce_range else 8,
        }

    def text(self) -> str:
        """:meth:`content` as JSON."""
        return json.dumps(self.content(), indent=1, ensure_ascii=False) + "\n"

    def check(self, overwrite: bool) -> None:
        """Raise :class:`ReclipError` if the file or ``classes.json`` must not be written at their paths."""
        if self.path.is_dir():
            raise ReclipError(f"{self.path} is a folder: name a file, or another folder")
        if self.path.exists() and not overwrite:
            raise ReclipError(f"{self.path} exists: give --overwrite, or another --output")
        self._others(overwrite)

    def write(self, overwrite: bool) -> Path:
        """Write ``classes.json``, or add this file to an existing one with the same classes; returns its path."""
        others = self._others(overwrite)
        content = self.content()
        content["files"] = {**others, **content["files"]}
        path = self.path.parent / CLASSES_FILE
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def _others(self, overwrite: bool) -> dict[str, Any]:
        """Other exported files that ``classes.json`` describes; raises if it has other classes.

        Other classes are allowed only if all described files are replaced: otherwise masks would lose their meaning.
        """
        path = self.path.parent / CLASSES_FILE
        if not path.exists():
            return {}
        content = read_json(path, _SCHEMA, "class list", "remove it, or give another --output")
        files = content.pop("files", None)
        others = {name: entry for name, entry in (files or {}).items() if name != self.path.name}
        if content == json.loads(self.classes.to_json()):
            return others
        if not overwrite or files is None or others:
            raise ReclipError(f"{path} has other classes: give an --output in another folder")
        return {}
