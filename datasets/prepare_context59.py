#!/usr/bin/env python
"""Prepare PASCAL Context (59 classes, all others ignored) for evaluation.

    python datasets/prepare_context59.py

Reads $DETECTRON2_DATASETS/VOC2010/trainval_merged.json or, if there is none, the index PNGs in
VOC2010/SegmentationClassContext, and writes VOC2010/annotations_detectron2 (and, from the JSON file, the lists of
images). See datasets/README.md.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reclip_d2.data.datasets.context59 import CONTEXT59, JSON_MAPPING, MAPPING_59, MAPPING_60
from reclip_d2.data.datasets.label_sources import IndexPNG, RunLengthLabel
from reclip_d2.data.datasets.preparation_program import argument_parser, label_folder, prepare_split
from reclip_d2.data.datasets.registration import README, check_image_id
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.utils.files import open_regular
from reclip_d2.utils.io import atomic_write

JSON_NAME = "trainval_merged.json"
SPLITS = ("train", "val")


def read_annotations(path: Path) -> dict[str, dict[str, RunLengthLabel]]:
    """Labels of trainval_merged.json by split and image. Masks keep the file's order, in which the Detail API
    paints."""
    try:
        with open_regular(path) as stream:
            content = json.load(stream)
        masks: dict[Any, list] = defaultdict(list)
        for annotation in content["annos_segmentation"]:
            masks[annotation["image_id"]].append((annotation["category_id"], annotation["segmentation"]))
        labels: dict[str, dict[str, RunLengthLabel]] = {split: {} for split in SPLITS}
        for image in content["images"]:
            if image["phase"] not in SPLITS:
                continue
            name = Path(image["file_name"]).stem
            if not name or name.split() != [name]:  # in lists, ids end at a space
                raise ValueError(f"image {name!r}")
            check_image_id(name, str(path))
            if not all(isinstance(image[side], int) for side in ("height", "width")):
                raise TypeError(f"size of image {name}")
            labels[image["phase"]][name] = RunLengthLabel(
                name=f"{path}, image {name},",
                size=(image["height"], image["width"]),
                masks=tuple(masks[image["image_id"]]),
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReclipError(f"{path} is not PASCAL Context's {JSON_NAME} ({error!r}): get it, see {README}") from error
    for split in SPLITS:
        if not labels[split]:
            raise ReclipError(f"{path} has no images of {split}: get PASCAL Context's {JSON_NAME}, see {README}")
    return labels


def write_lists(labels: dict[str, dict[str, RunLengthLabel]]) -> None:
    """Write the sorted image lists of the splits, unless they are up to date."""
    for split, names in labels.items():
        path = CONTEXT59.root / CONTEXT59.splits[split].image_list
        text = "".join(f"{name}\n" for name in sorted(names))
        if not path.is_file() or path.read_text() != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text)


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, SPLITS)
    parser.add_argument(
        "--source", choices=("auto", "json", "png"), default="auto", help=f"auto: {JSON_NAME} if it exists, else png"
    )
    parser.add_argument(
        "--png-classes",
        type=int,
        choices=(60, 59),
        default=60,
        help="encoding of the PNGs: 60: 0 is background, 1 to 59 the classes; 59: 0 to 58 the classes, 255 ignored",
    )
    args = parser.parse_args(arguments)
    label_folder(CONTEXT59.root / "JPEGImages")
    json_path = CONTEXT59.root / JSON_NAME
    is_there = os.path.lexists(json_path)
    if args.source == "json" or (args.source == "auto" and is_there):
        if not is_there:
            raise ReclipError(f"{json_path} does not exist: see {README}, or use --source png")
        labels = read_annotations(json_path)
        write_lists(labels)
        for split in args.splits:
            prepare_split(CONTEXT59, split, JSON_MAPPING, args, labels[split].__getitem__)
        return
    folder = label_folder(CONTEXT59.root / "SegmentationClassContext")
    mapping = MAPPING_60 if args.png_classes == 60 else MAPPING_59
    for split in args.splits:
        prepare_split(CONTEXT59, split, mapping, args, lambda name: IndexPNG(folder / f"{name}.png"))


if __name__ == "__main__":
    main()
