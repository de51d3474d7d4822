#!/usr/bin/env python
"""Prepare PASCAL VOC 2012 (20 classes, background ignored) for evaluation.

    python datasets/prepare_voc20.py

Reads $DETECTRON2_DATASETS/VOC2012/SegmentationClass and writes VOC2012/annotations_detectron2. With --sbd FOLDER (the
folder "dataset" of the Semantic Boundaries Dataset) it also writes the list of voc20_trainaug. See datasets/README.md.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
from collections.abc import Sequence
from pathlib import Path

from reclip_d2.data.datasets.label_sources import IndexPNG
from reclip_d2.data.datasets.preparation_program import argument_parser, label_folder, prepare_split
from reclip_d2.data.datasets.registration import README, read_image_list
from reclip_d2.data.datasets.voc20 import LABEL_MAPPING, LABEL_PALETTE, VOC20
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.utils.io import atomic_write


def write_trainaug(sbd: Path) -> None:
    """Write the list of voc20_trainaug: VOC's train and all images of SBD, without VOC's val, sorted by name."""
    names = set(VOC20.image_ids("train"))
    for name in ("train", "val"):
        path = sbd / f"{name}.txt"
        if not path.is_file():
            raise ReclipError(f"image list {path} does not exist: --sbd is the folder 'dataset' of SBD, see {README}")
        names |= set(read_image_list(path))
    names -= set(VOC20.image_ids("val"))
    target = VOC20.root / VOC20.splits["trainaug"].image_list
    with atomic_write(target) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in sorted(names)))
    complete = VOC20.splits["trainaug"].count
    print(f"voc20_trainaug: {len(names)} images in {target} (complete: {complete})")


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, ("train", "val"))
    parser.add_argument("--sbd", type=Path, help="SBD's folder 'dataset', with train.txt and val.txt")
    args = parser.parse_args(arguments)
    for split in args.splits:
        VOC20.image_ids(split)  # a missing data set is named before its labels
        folder = label_folder(VOC20.root / "SegmentationClass")
        prepare_split(
            VOC20,
            split,
            LABEL_MAPPING,
            args,
            lambda name, folder=folder: IndexPNG(folder / f"{name}.png", LABEL_PALETTE),
        )
    if args.sbd:
        write_trainaug(args.sbd)


if __name__ == "__main__":
    main()
