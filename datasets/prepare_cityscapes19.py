#!/usr/bin/env python
"""Prepare Cityscapes (19 classes, all others ignored) for evaluation.

    python datasets/prepare_cityscapes19.py

Reads $DETECTRON2_DATASETS/cityscapes/gtFine/*/*/*_gtFine_labelIds.png and writes cityscapes/annotations_detectron2;
needs no cityscapesscripts. See datasets/README.md.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
from collections.abc import Sequence

from reclip_d2.data.datasets.cityscapes19 import CITYSCAPES19, LABEL_MAPPING, LABEL_PALETTE
from reclip_d2.data.datasets.preparation_program import argument_parser, prepare_folder
from reclip_d2.errors import exit_on_error


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = argument_parser(__doc__, CITYSCAPES19.splits).parse_args(arguments)
    for split in args.splits:
        CITYSCAPES19.image_ids(split)  # a missing data set is named before its labels
        prepare_folder(
            CITYSCAPES19,
            split,
            LABEL_MAPPING,
            args,
            CITYSCAPES19.root / "gtFine" / split,
            suffix="_gtFine_labelIds.png",
            image_suffix="_leftImg8bit",
            palette=LABEL_PALETTE,
        )


if __name__ == "__main__":
    main()
