"""Arguments of ``reclip app``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import add_clip_arguments, add_device_arguments

# Limits for images: the defaults of reclip_d2.app.guard.Limits, which takes seconds to import. A test compares them.
APP_MEGAPIXELS, APP_MEGABYTES = 50, 64

DESCRIPTION = """\
Serve a browser page: drop images, type class names, see CLIP's own masks; learn the
bias from the images, see it, and compare the masks before and after.

Only this machine can reach the page unless --host is given; the page loads nothing
from other hosts. Press Ctrl-C to stop. Needs gradio: pip install "reclip_d2[app]"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model", metavar="FOLDER", help="output folder of reclip segment: use its model, classes and CLIP"
    )
    add_clip_arguments(parser, given_by="--model")
    parser.add_argument(
        "--output", metavar="FOLDER", help="keep models learnt on the page here (default: a temporary folder)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="another host name of the page, such as a proxy's; can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--max-megapixels", type=int, default=APP_MEGAPIXELS, metavar="N",
        help="reject images with more pixels, in millions (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-megabytes", type=int, default=APP_MEGABYTES, metavar="N",
        help="reject larger image files, in MiB (default: %(default)s)",
    )  # fmt: skip
    add_device_arguments(parser)
