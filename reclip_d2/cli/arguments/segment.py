"""Arguments of ``reclip segment``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import (
    add_background_argument,
    add_clip_arguments,
    add_device_arguments,
    add_image_arguments,
    add_output_arguments,
)

DESCRIPTION = """\
Train on your own images, without labels, and write a mask for each.

The class file has one class per line. Names after the first, separated by commas,
are synonyms; # starts a comment. A line `background: sky, wall` lists what else may
be in the images: masks ignore it (255), or have it as one class with --background
keep.

Masks are index PNGs below FOLDER/masks, in the same subfolders as the images: 0 is
the first class of the file, 255 is ignored. Interrupted runs resume when you repeat
the command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_image_arguments(parser)
    parser.add_argument("--classes", required=True, metavar="FILE", help="class file")
    add_output_arguments(parser)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="write CLIP's own masks (MaskCLIP), without training")
    depth.add_argument("--student", action="store_true", help="distil a student, and predict with it")
    add_background_argument(parser)
    add_clip_arguments(parser)
    parser.add_argument(
        "--iterations", type=int, metavar="N", help="iterations of the rectification (default: the config's)"
    )
    parser.add_argument(
        "--student-iterations", type=int, metavar="N", help="iterations of the distillation (default: the config's)"
    )
    parser.add_argument(
        "--student-weights",
        metavar="FILE|NAME",
        help="initial weights of the student's backbone (default: the config's)",
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="cut images with a longer side into tiles of this size"
    )
    add_device_arguments(parser)
