"""The recorded state of an output folder: ``reclip.json``.

The folder may come from somebody else, and the file decides which of the folder's files are moved and deleted, so only
the names of our own results are accepted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reclip_d2.data.class_file import ClassList
from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json

FORMAT = "reclip_d2 run 1"
MASKS, SUMMARY, PAGE, RUN = "masks", "summary.json", "summary.html", "run"
KINDS = ("maskclip", "calibrated", "rectified", "student")
BACKGROUNDS = ("ignore", "keep")
RESULTS = (MASKS, SUMMARY, PAGE, *(name for name in FORMATS if name != "index"))
"""All names that results can have in an output folder."""


def aside_name(kind: str, background: str) -> str:
    """Name of the folder that keeps these results while another kind of model's are in their place."""
    return f"previous-{kind}-{background}"


ASIDE = tuple(aside_name(kind, background) for kind in KINDS for background in BACKGROUNDS)

_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 1000}, "maxItems": 65536}
_TEXT = {"type": "string", "maxLength": 100_000}
CLASSES_SCHEMA = {
    "type": "object",
    "required": ["classes", "background"],
    "additionalProperties": False,
    "properties": {
        "classes": {"type": "array", "items": {**_NAMES, "minItems": 1}, "minItems": 1, "maxItems": 65536},
        "background": _NAMES,
        # Only in folders whose class file has queries after semicolons.
        "queries": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,5}$"},
            "additionalProperties": {"type": "array", "items": {**_NAMES, "minItems": 1}, "maxItems": 65536},
        },
    },
}
SCHEMA = {
    "type": "object",
    "required": ["format", "classes", "clip", "pretrained", "weights", "settings", "results", "entries"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "classes": CLASSES_SCHEMA,
        "clip": _TEXT,
        "pretrained": _TEXT,
        "weights": _TEXT,
        "settings": {
            "type": "object",
            "additionalProperties": False,
            "properties": {kind: {"type": "object", "additionalProperties": _TEXT} for kind in KINDS},
        },
        "results": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"model": {"enum": list(KINDS)}, "background": {"enum": list(BACKGROUNDS)}},
            "dependentRequired": {"model": ["background"], "background": ["model"]},
        },
        "entries": {"type": "array", "items": {"enum": list(RESULTS)}, "maxItems": 1000},
        "kept": {"enum": ["", *KINDS]},
    },
}


def classes_to_json(classes: ClassList) -> dict[str, Any]:
    """A class list in the form of :data:`CLASSES_SCHEMA`."""
    queries: dict[str, list[tuple[str, ...]]] = {}
    for index, names in classes.queries:
        queries.setdefault(str(index), []).append(names)
    further = {"queries": queries} if queries else {}
    return {"classes": classes.classes, "background": classes.background, **further}


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def classes_from_json(content: Mapping[str, Any], path: str) -> ClassList:
    """Read the class list of :func:`classes_to_json`.

    Args:
        path: the file, for messages.

    Raises:
        ReclipError: a query belongs to a class that is not there.
    """
    classes, further = tuple(map(tuple, content["classes"])), content.get("queries", {})
    if any(int(index) >= len(classes) for index in further):
        raise ReclipError(f"{path} is damaged: it has queries of a class that is not in its list")
    queries = tuple(
        (int(index), tuple(names)) for index, of_class in sorted(further.items(), key=_number) for names in of_class
    )
    return ClassList(classes, tuple(content["background"]), path, queries=queries)


@dataclasses.dataclass
class RunState:
    """The content of ``reclip.json``.

    Attributes:
        classes: the class list.
        clip: open_clip's name.
        pretrained: tag or file of its weights.
        weights: identity of the weights: the tag, or the digest of the file's content.
        settings: keys that each kind of model was made with.
        results: kind of model and background of the current masks; empty if there are none.
        entries: files and folders of these results.
        kept: kind of model whose masks the run kept in the end, which predicts further images; "" if that is not
            decided.
    """

    classes: ClassList
    clip: str
    pretrained: str
    weights: str
    settings: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    results: dict[str, str] = dataclasses.field(default_factory=dict)
    entries: list[str] = dataclasses.field(default_factory=list)
    kept: str = ""

    @classmethod
    def read(cls, file: Path, remedy: str) -> RunState:
        """Read the state from a file.

        Args:
            remedy: what to do if the file cannot be read, for the error.

        Raises:
            ReclipError: the file is missing or damaged, or lists files that are not results.
        """
        content: dict[str, Any] = read_json(file, SCHEMA, "run file", remedy)
        del content["format"]
        return cls(classes_from_json(content.pop("classes"), str(file)), **content)

    def write(self, file: Path) -> None:
        """Write the state."""
        content = dataclasses.asdict(self)
        content["classes"] = classes_to_json(self.classes)
        with atomic_write(file) as temporary:
            text = json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
