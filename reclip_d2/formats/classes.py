"""The classes of masks: ids, names and colours, and the file ``classes.json`` that stores them.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reclip_d2.data.colors import class_colors
from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MissingFileError, read_json

CLASSES_FILE = "classes.json"
# Ids 0 to 254 and the ignore label 255 fill 8 bits.
MAX_8BIT_CLASSES = 255
MAX_CLASSES = 65535

Color = tuple[int, int, int]

_CHANNEL = {"type": "integer", "minimum": 0, "maximum": 255}
_CLASS = {
    "type": "object",
    "required": ["id", "name", "color"],
    "properties": {
        "id": {"type": "integer"},
        "name": {"type": "string"},
        "color": {"type": "array", "items": _CHANNEL, "minItems": 3, "maxItems": 3},
    },
}
_SCHEMA = {
    "type": "object",
    "required": ["classes", "background"],
    "properties": {
        "classes": {"type": "array", "items": _CLASS, "maxItems": MAX_CLASSES},
        "background": {"type": ["integer", "null"]},
    },
}


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """The classes of mask ids: id ``k`` is ``names[k]``.

    Attributes:
        names: C distinct names.
        colors: C RGB colours, 0 to 255 each.
        background: id of the class for everything else; None without one. Formats of annotation
            tools leave it unannotated; see :mod:`reclip_d2.formats`.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    background: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise ReclipError(f"masks of {len(self.names)} classes cannot be written: name 1 to {MAX_CLASSES}")
        for name in self.names:
            if not name or name != name.strip() or not name.isprintable():
                raise ReclipError(
                    f"class name {name!r} is empty, or has control characters, or a space at either end: rewrite it"
                )
        if len(set(self.names)) < len(self.names):
            twice = next(name for k, name in enumerate(self.names) if name in self.names[:k])
            raise ReclipError(f"class name {twice!r} occurs twice: names must differ")
        if len(self.colors) != len(self.names) or not all(
            len(color) == 3 and all(0 <= value <= 255 for value in color) for color in self.colors
        ):
            raise ValueError(f"colors must be {len(self.names)} triples of 0 to 255")
        if self.background is not None and not 0 <= self.background < len(self.names):
            raise ValueError(f"background must be an id below {len(self.names)}, not {self.background}")

    @classmethod
    def make(
        cls,
        names: Sequence[str],
        palette: np.ndarray | Sequence[Sequence[int]] | None = None,
        background: int | None = None,
    ) -> MaskClasses:
        """Classes by name.

        Args:
            names: C names.
            palette: ``(C, 3)`` integers, 0 to 255; by default distinct colours.
            background: see :class:`MaskClasses`.
        """
        colors = class_colors(len(names)) if palette is None else np.asarray(palette)
        return cls(tuple(names), tuple(tuple(map(int, color)) for color in colors), background)

    @property
    def dtype(self) -> np.dtype:
        """Type of label maps: uint8, or uint16 for more than 255 classes."""
        return np.dtype(np.uint8 if len(self.names) <= MAX_8BIT_CLASSES else np.uint16)

    @property
    def ignore_label(self) -> int:
        """Value of pixels without a class: 255, or 65535 for more than 255 classes."""
        return int(np.iinfo(self.dtype).max)

    @property
    def annotated(self) -> list[int]:
        """Ids of all classes except the background, ascending."""
        return [k for k in range(len(self.names)) if k != self.background]

    def checked(self, labels: np.ndarray, what: str) -> np.ndarray:
        """Labels ``(H, W)`` as a contiguous array of :attr:`dtype`.

        Args:
            what: the image, for the message.

        Raises:
            ReclipError: an id is neither a class nor the ignore label.
        """
        if labels.dtype == np.uint8 and len(self.names) == MAX_8BIT_CLASSES:
            return np.ascontiguousarray(labels)  # every value is valid
        wrong = (labels >= len(self.names)) & (labels != self.ignore_label)
        if labels.dtype.kind == "i":
            wrong |= labels < 0
        if wrong.any():
            raise ReclipError(
                f"mask of {what} has id {labels[wrong][0]}, but the classes are 0 to {len(self.names) - 1} and"
                f" {self.ignore_label} is ignored: it was made with another class list; predict again"
            )
        return np.ascontiguousarray(labels, dtype=self.dtype)

    def table(self, ignored: Color = (0, 0, 0)) -> np.ndarray:
        """Colours by label, ``(256 or 65536, 3)`` uint8; labels without a class have the colour ``ignored``."""
        table = np.full((self.ignore_label + 1, 3), ignored, dtype=np.uint8)
        table[: len(self.colors)] = self.colors
        return table

    def to_json(self) -> str:
        """The text of ``classes.json``."""
        classes = [
            {"id": k, "name": name, "color": list(color)}
            for k, (name, color) in enumerate(zip(self.names, self.colors, strict=True))
        ]
        content = {"ignore_label": self.ignore_label, "background": self.background, "classes": classes}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write ``classes.json`` into a folder of index masks.

        Raises:
            ReclipError: the folder has masks of other classes.
        """
        path = folder / CLASSES_FILE
        if path.exists() and MaskClasses.read(folder) != self:
            raise ReclipError(f"{folder} contains masks of another class list: remove it, or choose another output")
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> MaskClasses:
        """Read ``classes.json`` of a folder of index masks.

        Raises:
            ReclipError: the file is missing or damaged.
        """
        path = folder / CLASSES_FILE
        try:
            content = read_json(path, _SCHEMA, "class list", "predict again")
        except MissingFileError:
            raise ReclipError(f"{path} is missing: it belongs to the index masks; predict again") from None
        classes = content["classes"]
        try:
            if [entry["id"] for entry in classes] != list(range(len(classes))):
                raise ValueError("the ids are not 0, 1, 2, ...")
            return cls.make(
                [entry["name"] for entry in classes], [entry["color"] for entry in classes], content["background"]
            )
        except ValueError as error:
            raise ReclipError(f"class list {path} is damaged ({error}): predict again") from error


def distinct_colors(colors: Sequence[Color], taken: set[Color]) -> list[Color]:
    """The colours, with duplicates and those in ``taken`` replaced by the next free one (blue counts up first).

    For formats that identify classes by colour.
    """
    taken = set(taken)
    result = []
    for red, green, blue in colors:
        color = (red, green, blue)
        while color in taken:
            number = (((color[0] << 16) | (color[1] << 8) | color[2]) + 1) % (1 << 24)
            color = (number >> 16, number >> 8 & 255, number & 255)
        taken.add(color)
        result.append(color)
    return result
