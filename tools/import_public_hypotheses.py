#!/usr/bin/env python
"""Import image-level hypotheses of the public ReCLIP and ReCLIP++ code.

    python tools/import_public_hypotheses.py text/voc_pseudo_label_ReCLIPPP.json output/voc20_train.jsonl \
        --dataset voc20_train --list datasets/VOC2012/ImageSets/Segmentation/train.txt

The public files have one JSON list of class ids per line, in the order of a list of the training images. Pass that list
with ``--list``; the default is the order of the registered data set. Train with ``HYPOTHESIS.METHOD imported
HYPOTHESIS.FILE <OUT>``.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.data.classes import class_names_of
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.hypothesis.file import HypothesisHeader, write_hypothesis_file
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.utils.files import MIB, read_text
from reclip_d2.utils.json_files import JsonError, parse_json
from reclip_d2.utils.output_paths import check_output_path

# Suffixes of file names that lists omit (Cityscapes).
LEFT_OUT = ("_leftImg8bit",)
# Enough for lists of COCO's images.
_MAX_BYTES = 256 * MIB


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hypotheses", type=Path, metavar="IN", help="public file: one list of class ids per line")
    parser.add_argument("output", metavar="OUT", help="hypothesis file to write")
    parser.add_argument("--dataset", required=True, help="registered data set of the training images")
    parser.add_argument("--list", type=Path, help="list file with the order of the lines (default: the data set's)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def _read_lines(path: Path) -> list[str]:
    lines = read_text(path, limit=_MAX_BYTES).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_public_hypotheses(path: Path, num_classes: int) -> list[list[int]]:
    """Class ids of each line, sorted, without duplicates.

    Raises:
        ReclipError: a line is not a list of ids, is empty, or has an id out of range; the message gives its number.
    """
    result = []
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            ids = parse_json(line)
        except JsonError as error:
            raise ReclipError(f"{path} line {number} is not a JSON list of class ids: {line[:40]!r}") from error
        if not isinstance(ids, list) or not all(isinstance(k, int) and not isinstance(k, bool) for k in ids):
            raise ReclipError(f"{path} line {number} is not a JSON list of class ids: {line[:40]!r}")
        if not ids:
            raise ReclipError(f"{path} line {number} is an empty list: every image needs a class")
        wrong = [k for k in ids if not 0 <= k < num_classes]
        if wrong:
            raise ReclipError(
                f"{path} line {number} has class id {wrong[0]}, but the data set has {num_classes} classes, 0 to"
                f" {num_classes - 1}"
            )
        result.append(sorted(set(ids)))
    return result


def _stem(name: str) -> str:
    """Name of an image without folder, extension and suffixes that lists omit."""
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    head, dot, extension = base.rpartition(".")
    if dot and extension.lower() in ("jpg", "jpeg", "png"):
        base = head
    for ending in LEFT_OUT:
        base = base.removesuffix(ending)
    return base


def order_records(records: Sequence[dict[str, Any]], list_file: Path) -> list[dict[str, Any]]:
    """Records in the order of a list file, matched by file name without folder and extension.

    Raises:
        ReclipError: list and data set have different images.
    """
    by_stem: dict[str, dict[str, Any]] = {}
    for record in records:
        stem = _stem(record["file_name"])
        if stem in by_stem:
            raise ReclipError(f"two images of the data set are called {stem}: the list cannot tell them apart")
        by_stem[stem] = record
    ordered = []
    for number, line in enumerate(_read_lines(list_file), start=1):
        words = line.split()
        record = by_stem.pop(_stem(words[0]), None) if words else None
        if record is None:
            raise ReclipError(
                f"{list_file} line {number}: {line.strip()[:60]!r} is not an image of the data set, or is listed twice"
            )
        ordered.append(record)
    if by_stem:
        raise ReclipError(f"{list_file} lacks {len(by_stem)} images of the data set, such as {next(iter(by_stem))}")
    return ordered


@exit_on_error
def main(argv: Sequence[str] | None = None) -> None:
    """Import."""
    args = argument_parser().parse_args(argv)
    args.output = check_output_path(args.output, "OUT")
    if args.output.exists() and not args.overwrite:
        raise ReclipError(f"{args.output} exists: add --overwrite, or name another output")
    class_names = class_names_of(args.dataset)
    hypotheses = read_public_hypotheses(args.hypotheses, len(class_names))
    records = unlabelled_records([args.dataset])
    if args.list:
        records = order_records(records, args.list)
    if len(hypotheses) != len(records):
        raise ReclipError(
            f"{args.hypotheses} has {len(hypotheses)} lines for {len(records)} images of {args.list or args.dataset}:"
            " it belongs to another list"
        )
    header = HypothesisHeader(
        dataset=args.dataset,
        class_names=class_names,
        clip="",
        fingerprint="",
        templates="",
        method="imported",
        window_ratio=0.0,
    )
    write_hypothesis_file(
        args.output,
        header,
        ({"image_id": r["image_id"], "classes": ids} for r, ids in zip(records, hypotheses, strict=True)),
    )
    mean = sum(map(len, hypotheses)) / max(1, len(hypotheses))
    print(f"wrote {args.output}: {len(hypotheses)} images, {mean:.2f} classes per image")


if __name__ == "__main__":
    main()
