#!/usr/bin/env python
"""Prepare COCO-Stuff, with 171 leaf classes and with 27 mid-level classes, for evaluation.

    python datasets/prepare_coco_stuff.py

Reads $DETECTRON2_DATASETS/coco/stuffthingmaps and writes coco/annotations_detectron2/coco_stuff171 and
coco_stuff27. See datasets/README.md.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
from collections.abc import Sequence

from reclip_d2.data.datasets.coco_stuff import COCO_STUFF27, COCO_STUFF171, MAPPING_27, MAPPING_171
from reclip_d2.data.datasets.preparation_program import argument_parser, prepare_folder
from reclip_d2.errors import exit_on_error

VARIANTS = {27: (COCO_STUFF27, MAPPING_27), 171: (COCO_STUFF171, MAPPING_171)}


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, COCO_STUFF27.splits)
    parser.add_argument("--classes", nargs="+", type=int, choices=(27, 171), default=[27, 171], help="default: both")
    args = parser.parse_args(arguments)
    for split in args.splits:
        for classes in args.classes:
            dataset, mapping = VARIANTS[classes]
            dataset.image_ids(split)  # a missing data set is named before its labels
            prepare_folder(dataset, split, mapping, args, dataset.root / "stuffthingmaps" / f"{split}2017")


if __name__ == "__main__":
    main()
