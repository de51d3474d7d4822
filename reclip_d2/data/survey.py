"""Survey of a user's images: which can be read, how large they are, and what to train on.

Every image is decoded once, so that broken files are found before hours of training; of GeoTIFFs, the windows to train
on are cut out. Results are cached in a JSON Lines file, one line per image, and are valid until the image's content
changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reclip_d2.data.geotiff import SceneStretch, open_scene
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import check_aspect, peek_pixels, read_image
from reclip_d2.data.stretch import Limits
from reclip_d2.data.working_files import WorkingFiles, check_shape
from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import current_digest
from reclip_d2.utils.files import open_to_append
from reclip_d2.utils.io import naming_errors
from reclip_d2.utils.json_files import read_json_lines
from reclip_d2.utils.progress import count_steps

# A line of the record. Working files are in a folder of the run: names that point outside it were not written here.
_LINE = {
    "type": "object",
    "required": ["image_id", "size", "problem", "working", "signature"],
    "properties": {
        "image_id": {"type": "string"},
        "size": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
        "problem": {"type": "string"},
        "working": {"type": "array", "items": {"type": "string", "pattern": r"^(?!/)(?!.*(^|/)\.\.(/|$))[^\x00]+$"}},
        "signature": {"type": "string"},
        "stretch": {
            "type": "object",
            "required": ["limits", "sampled"],
            "additionalProperties": False,
            "properties": {
                "limits": {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
                },
                "sampled": {"type": "string"},
            },
        },
    },
}
# Images with more pixels are decoded one at a time, others in threads.
_LARGE = 50_000_000


@dataclasses.dataclass(frozen=True)
class SurveyedImage:
    """What is known about an image.

    Attributes:
        file: the image.
        size: (H, W), upright; (0, 0) if it is broken.
        problem: why it cannot be used, one line; "" if it can.
        training_files: what is used for training: the file itself, a smaller copy, tiles, or windows; none of a GeoTIFF
            without data.
        stretch: of a GeoTIFF, for its masks, too.
    """

    file: ImageFile
    size: tuple[int, int]
    problem: str
    training_files: tuple[Path, ...]
    stretch: SceneStretch | None = None


def survey_images(
    images: Sequence[ImageFile],
    digests: dict[str, str],
    record: Path,
    working_files: WorkingFiles,
    threads: int = 4,
) -> list[SurveyedImage]:
    """Survey all images that are not in ``record`` yet.

    Args:
        digests: digest of each image's content, by id (:func:`~reclip_d2.utils.digest.file_digests`).
        record: JSON Lines file; a line is appended for each image when it and its working files are done.
        working_files: makes the files that replace large images in training.
        threads: images decoded at a time.

    Returns:
        All images, in order.
    """
    current = {image.image_id: f"{digests[image.image_id]} {working_files.rule(image)}" for image in images}
    paths = {image.image_id: image.path for image in images}
    known = {
        key: line
        for key, line in _read(record).items()
        if key in paths and _current_signature(line["signature"], paths[key]) == current[key]
    }
    missing = [image for image in images if not _is_complete(known.get(image.image_id), working_files)]
    record.parent.mkdir(parents=True, exist_ok=True)

    def look(image: ImageFile) -> dict[str, Any]:
        return {**_look(image, working_files), "signature": current[image.image_id]}

    with (
        naming_errors(record),
        open_to_append(record) as stream,
        count_steps("images", len(missing)) as steps,
        contextlib.closing(_in_threads(look, missing, threads)) as lines,
    ):
        for line in lines:
            # Appended, not rewritten. The leading newline ends a line that a kill has truncated, which _read skips.
            stream.write("\n" + json.dumps(line))
            stream.flush()
            known[line["image_id"]] = line
            steps.advance()
    return [_surveyed(image, known[image.image_id], working_files.folder) for image in images]


def _current_signature(recorded: str, path: Path) -> str:
    """The signature of a line: the file's digest and the rule, updated if an earlier version wrote it."""
    digest, _, rule = recorded.partition(" ")
    return f"{current_digest(digest, path)} {rule}"


def _look(image: ImageFile, working_files: WorkingFiles) -> dict[str, Any]:
    """Decode an image, make its working files, and return its line of the record, without the signature."""
    line: dict[str, Any] = {"image_id": image.image_id, "size": [0, 0], "problem": "", "working": []}
    try:
        if image.is_scene:
            return {**line, **_look_at_scene(image, working_files)}
        pixels = read_image(image.path)
        check_shape(image.path, pixels.shape[:2], working_files.tiling)
    except ReclipError as error:
        return {**line, "problem": str(error)}
    return {**line, "size": list(pixels.shape[:2]), "working": working_files.make(pixels, image.image_id)}


def _look_at_scene(image: ImageFile, working_files: WorkingFiles) -> dict[str, Any]:
    """Cut out a GeoTIFF's training windows; entries of its line of the record."""
    with open_scene(image.path, working_files.reading) as scene:
        height, width, _ = scene.shape
        side = working_files.windows.size
        check_aspect(image.path, (min(height, side), min(width, side)))
        working = working_files.make_windows(scene, image.image_id)
        limits = [[limits.low, limits.high] for limits in scene.limits]
        stretch = {"limits": limits, "sampled": scene.stretch.sampled}
    return {"size": [height, width], "working": working, "stretch": stretch}


def _in_threads(
    look: Callable[[ImageFile], dict[str, Any]], images: Sequence[ImageFile], threads: int
) -> Iterator[Any]:
    """Results of ``look``; large images and GeoTIFFs come last, one at a time."""
    large = {image.image_id for image in images if image.is_scene or peek_pixels(image.path) > _LARGE}
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(look, [image for image in images if image.image_id not in large])
    yield from map(look, [image for image in images if image.image_id in large])


def _is_complete(line: dict[str, Any] | None, working_files: WorkingFiles) -> bool:
    return line is not None and all((working_files.folder / name).exists() for name in line["working"])


def _surveyed(image: ImageFile, line: dict[str, Any], folder: Path) -> SurveyedImage:
    files = tuple(folder / name for name in line["working"])
    stretch = line.get("stretch")
    if stretch is not None:
        stretch = SceneStretch(tuple(Limits(*ends) for ends in stretch["limits"]), stretch["sampled"])
    if not files and not image.is_scene:
        files = (image.path,)
    return SurveyedImage(image, (line["size"][0], line["size"][1]), line["problem"], files, stretch)


def _read(record: Path) -> dict[str, dict[str, Any]]:
    """The last line of each image id in the record; images with invalid lines are surveyed again."""
    return {line["image_id"]: line for line in read_json_lines(record, _LINE)}
