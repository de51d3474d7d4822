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

The class file has a class a line. Names after the first, separated by commas, are
synonyms; # begins a comment. A line `background: sky, wall` names what else may be
seen: in the masks it is ignored (255), or one class with --background keep.

Masks are index PNGs below FOLDER/masks, in the folders of the images: 0 is the
first class of the file, 255 is ignored. A run that was stopped goes on when the
same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_image_arguments(parser)
    parser.add_argument("--classes", required=True, metavar="FILE", help="class file")
    add_output_arguments(parser)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="no training: CLIP's own masks (MaskCLIP)")
    depth.add_argument("--student", action="store_true", help="distil a small model, and predict with it")
    add_background_argument(parser)
    add_clip_arguments(parser)
    parser.add_argument("--iterations", type=int, metavar="N", help="of the rectification (default: the config's)")
    parser.add_argument("--student-iterations", type=int, metavar="N", help="of the distillation")
    parser.add_argument(
        "--student-weights",
        metavar="FILE|NAME",
        help="initial weights of the student's backbone (default: the config's)",
    )
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="cut all images with a longer side into such tiles")
    add_device_arguments(parser)
