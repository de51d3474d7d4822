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
Write the masks of images with a model that `reclip segment` has trained.

Masks and formats are as there, below FOLDER. Masks that are already there are
kept, so the same command goes on after a stop, and serves a growing folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_image_arguments(parser)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="--output of the run of reclip segment")
    add_output_arguments(parser)
    parser.add_argument(
        "--use", choices=list(TITLES), help="which of its models (default: the last that it has trained)"
    )
    add_background_argument(parser)
    parser.add_argument(
        "--pretrained", metavar="FILE|TAG", help="CLIP's weights, if the file is no longer where it was at the training"
    )
    add_device_arguments(parser)
