"""Arguments of ``reclip doctor``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import add_clip_arguments

DESCRIPTION = """\
List what is installed and what is missing. The exit status is 0 if `reclip segment`
can run with this --clip and --pretrained, and 1 otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_clip_arguments(parser)
    parser.add_argument(
        "--install-detectron2",
        action="store_true",
        help="first install Detectron2 0.5 if it is missing; see python -m reclip_d2.install_detectron2 --help",
    )
