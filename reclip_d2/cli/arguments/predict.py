"""Arguments of ``reclip predict``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import (
    add_background_argument,
    add_device_arguments,
    add_image_arguments,
    add_output_arguments,
)
from reclip_d2.workspace.options import TITLES

DESCRIPTION = """\
Write masks of images with a model trained by `reclip segment`.

Masks and other formats are written below FOLDER, as by `reclip segment`. Existing
masks are kept: repeat the command to resume, or after adding images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_image_arguments(parser)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="output folder of reclip segment, or a saved model"
    )
    add_output_arguments(parser)
    parser.add_argument("--use", choices=list(TITLES), help="model to use (default: the last trained one)")
    add_background_argument(parser)
    parser.add_argument(
        "--pretrained", metavar="FILE|TAG", help="CLIP's weights, if they have moved since the training"
    )
    add_device_arguments(parser)
