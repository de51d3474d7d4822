#!/usr/bin/env python
"""Prepare ADE20K scene parsing (150 classes, all others ignored) for evaluation.

    python datasets/prepare_ade150.py

Reads $DETECTRON2_DATASETS/ADEChallengeData2016/annotations and writes annotations_detectron2 next to it: ids minus one,
0 becomes 255. See datasets/README.md.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
from collections.abc import Sequence

from reclip_d2.data.datasets.ade150 import ADE150, LABEL_MAPPING
from reclip_d2.data.datasets.preparation_program import argument_parser, prepare_folder
from reclip_d2.errors import exit_on_error

FOLDERS = {"train": "annotations/training", "val": "annotations/validation"}


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = argument_parser(__doc__, FOLDERS).parse_args(arguments)
    for split in args.splits:
        ADE150.image_ids(split)  # a missing data set is named before its labels
        prepare_folder(ADE150, split, LABEL_MAPPING, args, ADE150.root / FOLDERS[split])


if __name__ == "__main__":
    main()
