"""The hypothesis file: JSON Lines, a header and then one line per image.

The header records what the file was made with; files for another data set, vocabulary, CLIP, template set or rule are
rejected. Each line has what the rule needs to derive H for any threshold: the best class of each window (``top1``; the
windows follow from the image's ``size`` and r, see :func:`~reclip_d2.hypothesis.windows.crop_windows`), the same after
calibration of the scores (``top1_calibrated``, not in the papers), or ``scores``: the score of each class for the
whole-image rule, its share of the patches' labels for dense hypotheses. Imported hypotheses are stored as class ids
(``classes``), independent of any rule and CLIP.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reclip_d2.config.keys import KEYS
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.rules import (
    hypothesis_from_scores,
    hypothesis_from_windows,
    threshold_for_mean,
    window_frequencies,
)
from reclip_d2.hypothesis.windows import count_windows
from reclip_d2.utils.files import open_regular
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MAX_LINE_BYTES, JsonError, check_schema, parse_json
from reclip_d2.utils.text import shorten

FORMAT = "reclip_d2 hypothesis 1"
# Methods that assign a class to each window.
WINDOW_METHODS = ("crops", "one_pass")
_NAMES = {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "minItems": 1}}
_HEADER_SCHEMA = {
    "type": "object",
    "required": ["dataset", "class_names", "clip", "fingerprint", "templates", "method", "window_ratio"],
    "additionalProperties": False,
    "properties": {
        **{
            name: {"type": "string"}
            for name in (
                "dataset",
                "clip",
                "fingerprint",
                "templates",
                "images",
                "attention",
                "class_shares",
                "precision",
            )  # fmt: skip
        },
        "class_names": _NAMES,
        "method": {"enum": [*WINDOW_METHODS, "image", "dense", "imported"]},
        "window_ratio": {"type": "number"},
        "image_sides": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "split_block": {"type": "integer"},
        "pixel_statistics": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    },
}

_REMEDY = "remove it, and the next run computes it again, or set HYPOTHESIS.FILE"
# Scores are cosines, or shares of an image; with a margin for rounding.
_LARGEST_SCORE = 1.001


def _default_statistics() -> list[list[float]]:
    return [list(KEYS[f"MODEL.{key}"].default) for key in ("PIXEL_MEAN", "PIXEL_STD")]


@dataclasses.dataclass(frozen=True)
class HypothesisHeader:
    """What a hypothesis file was made with.

    Attributes:
        dataset: registered name of the data set.
        class_names: for each class its name and any synonyms.
        clip: open_clip name of the model.
        fingerprint: hash of its weights.
        templates: name of the template set.
        method: ``crops`` (Eq. 6), ``one_pass`` (the same windows in one forward pass), ``image`` (ReCLIP's rule),
            ``dense`` (labels of the patches) or ``imported``.
        window_ratio: r; 0 for methods without windows.
        image_sides: for ``one_pass`` and ``dense``: short side and maximum long side of the images, see
            :func:`~reclip_d2.hypothesis.windows.one_pass_size`.
        split_block: for ``one_pass``: index of the first block with separate window tokens.
        pixel_statistics: mean and standard deviation for normalising images; files of earlier versions do not record
            them, and were made with OpenAI's.
        attention: for ``dense``: what the dense features depend on besides the weights.
        class_shares: for ``dense``: the class shares of the labels, see
            :func:`~reclip_d2.hypothesis.dense.class_offset`.
        precision: of the image tower, unless it is float32; the cache keeps such files apart, but a file that the
            user names is valid for any precision.
        images: hash of the ids and contents of the images; "" in files of earlier versions, and then not compared.
    """

    dataset: str
    class_names: list[list[str]]
    clip: str
    fingerprint: str
    templates: str
    method: str
    window_ratio: float
    image_sides: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    split_block: int = 0
    pixel_statistics: list[list[float]] = dataclasses.field(default_factory=_default_statistics)
    images: str = ""
    attention: str = ""
    class_shares: str = ""
    precision: str = ""

    def fields(self) -> dict[str, Any]:
        """Plain values by name. Fields that a method does not have are left out, as in files of earlier versions."""
        optional = ("attention", "class_shares", "precision")
        return {key: value for key, value in dataclasses.asdict(self).items() if value or key not in optional}

    def difference(self, other: HypothesisHeader) -> str | None:
        """Name and both values of the first field that differs; None if there is none.

        Imported hypotheses do not depend on CLIP, templates or windows.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if "imported" in (self.method, other.method):
            names = ["method", "dataset", "class_names"]
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "precision" or (name == "images" and not (mine and theirs)):
                continue
            if mine != theirs and name == "images":
                return "version of the images"
            if mine != theirs:
                return f"{name} {shorten(theirs)} instead of {shorten(mine)}"
        return None


def write_hypothesis_file(path: Path, header: HypothesisHeader, lines: Iterable[dict[str, Any]]) -> None:
    """Write the header and the images' lines, atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write(json.dumps({"format": FORMAT, **header.fields()}) + "\n")
        for line in lines:
            stream.write(json.dumps(line, separators=(",", ":")) + "\n")


def read_header(path: Path) -> HypothesisHeader:
    """The header of a hypothesis file.

    Raises:
        ReclipError: the file is missing, is not a hypothesis file, or is damaged.
    """
    with open_regular(path, "hypothesis file", _REMEDY) as stream:
        try:
            return _parse_header(stream.readline(MAX_LINE_BYTES), path)
        except JsonError as error:
            raise ReclipError(f"{path} is damaged (line 1: {error}): {_REMEDY}") from error


def _parse_header(line: bytes, path: Path) -> HypothesisHeader:
    head = parse_json(line or "null")
    if not isinstance(head, dict) or head.pop("format", None) != FORMAT:
        raise ReclipError(f"{path} is not a hypothesis file ({FORMAT}): {_REMEDY}")
    check_schema(head, _HEADER_SCHEMA)
    return HypothesisHeader(**head)


def read_hypothesis_file(path: Path, expected: HypothesisHeader) -> dict[str, dict[str, Any]]:
    """Lines of a hypothesis file by image id.

    Raises:
        ReclipError: the file is not a hypothesis file, differs from ``expected``, or is damaged.
    """
    remedy = _REMEDY
    lines: dict[str, dict[str, Any]] = {}
    number = 1
    with open_regular(path, "hypothesis file", remedy) as stream:
        try:
            if difference := expected.difference(_parse_header(stream.readline(MAX_LINE_BYTES), path)):
                raise ReclipError(f"{path} was made with another {difference}: {remedy}")
            while text := stream.readline(MAX_LINE_BYTES):
                number += 1
                line = parse_json(text)
                # A schema would be slow here; the lists are checked when they are used.
                if not isinstance(line, dict) or not isinstance(line.get("image_id"), str | int):
                    raise JsonError("without an image_id")
                if lines.setdefault(line["image_id"], line) != line:
                    raise JsonError("another line of its image")
        except JsonError as error:
            raise ReclipError(f"{path} is damaged (line {number}: {error}): {remedy}") from error
    return lines


def hypotheses_of(
    lines: dict[str, dict[str, Any]],
    header: HypothesisHeader,
    image_ids: Iterable[str],
    threshold: float,
    calibrated: bool = False,
) -> dict[str, list[int]]:
    """Hypothesis H of each image, by its id.

    Args:
        threshold: t of Eq. (6), or the minimum score of the whole-image rule; not used for imported hypotheses.
        calibrated: use the windows' calibrated classes.

    Raises:
        ReclipError: an image has no line, or its line is damaged.
    """
    key = _key_of(header, calibrated)
    result = {}
    for image_id, values in _values(lines, header, image_ids, key):
        if key == "scores":
            result[image_id] = hypothesis_from_scores(values, threshold)
        elif key == "classes":
            result[image_id] = sorted(set(values))
        else:
            result[image_id] = hypothesis_from_windows(values, threshold)
    return result


def find_threshold(
    lines: dict[str, dict[str, Any]],
    header: HypothesisHeader,
    image_ids: Iterable[str],
    classes_per_image: float,
    calibrated: bool = False,
) -> float:
    """The threshold for :func:`hypotheses_of` at which images have ``classes_per_image`` classes on average.

    Args:
        classes_per_image: from 1 to the number of classes.
        calibrated: see :func:`hypotheses_of`.

    Raises:
        ReclipError: ``classes_per_image`` exceeds the number of classes, the hypotheses are imported, or an image has
            no line or a damaged one.
    """
    num_classes, key = len(header.class_names), _key_of(header, calibrated)
    if key == "classes":
        raise ReclipError("HYPOTHESIS.CLASSES_PER_IMAGE does not apply to HYPOTHESIS.METHOD imported: set it to 0")
    check_classes_per_image(classes_per_image, num_classes)
    rows = [
        np.asarray(values, dtype=np.float64) if key == "scores" else window_frequencies(values, num_classes).numpy()
        for _, values in _values(lines, header, image_ids, key)
    ]
    return threshold_for_mean(np.stack(rows), classes_per_image, -1.0 if header.method == "image" else 0.0)


def check_classes_per_image(classes_per_image: float, num_classes: int) -> None:
    """Raise :class:`ReclipError` if ``HYPOTHESIS.CLASSES_PER_IMAGE`` exceeds the number of classes."""
    if classes_per_image > num_classes:
        raise ReclipError(
            f"HYPOTHESIS.CLASSES_PER_IMAGE is {classes_per_image:g}, but there are {num_classes} classes: lower it"
        )


def _key_of(header: HypothesisHeader, calibrated: bool) -> str:
    """The entry of a line that the rule needs."""
    if header.method in WINDOW_METHODS:
        return "top1_calibrated" if calibrated else "top1"
    return "classes" if header.method == "imported" else "scores"


def _values(
    lines: dict[str, dict[str, Any]], header: HypothesisHeader, image_ids: Iterable[str], key: str
) -> Iterator[tuple[str, list[Any]]]:
    """The checked list of each image's line."""
    for image_id in image_ids:
        if image_id not in lines:
            raise ReclipError(
                f"the hypothesis file has no line for image {image_id!r} of {header.dataset}:"
                " remove the file, and the next run computes it again, or set HYPOTHESIS.FILE"
            )
        values = lines[image_id].get(key)
        sound = _is_sound(values, key, len(header.class_names))
        if sound and header.method in WINDOW_METHODS and "size" in lines[image_id]:
            sound = len(values) == _count_windows(lines[image_id]["size"], header.window_ratio)
        if not sound:
            raise ReclipError(
                f"the hypothesis file's line for image {image_id!r} is damaged ({key}): remove the file, and the next"
                " run computes it again"
            )
        yield image_id, values


def _count_windows(size: Any, ratio: float) -> int:
    """Number of windows of an image of ``[height, width]``; 0 if this is not a size."""
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and 0 < side < 2**31 for side in size):
        return 0
    return count_windows(size[0], size[1], ratio)


def _is_sound(values: Any, key: str, num_classes: int) -> bool:
    """Whether a line's list has one score per class, or valid class ids."""
    if not isinstance(values, list) or not values:
        return False
    if key == "scores":
        return len(values) == num_classes and all(
            isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= _LARGEST_SCORE for v in values
        )
    return all(isinstance(v, int) and 0 <= v < num_classes for v in values)
