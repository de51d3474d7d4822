"""Arguments of ``reclip app``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import add_clip_arguments, add_device_arguments

# Of an image that the page takes: the defaults of reclip_d2.app.limits.Limits, which takes seconds to import. A test
# compares them.
APP_MEGAPIXELS, APP_MEGABYTES = 50, 64

DESCRIPTION = """\
Serve a page for the browser: drop images, type class names, see CLIP's own masks,
learn the bias from the images, see it, and the masks before and after.

Only this machine can reach the page, unless --host says otherwise; the page fetches
nothing from elsewhere. Ctrl-C ends it. Needs gradio: pip install "reclip_d2[app]"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model", metavar="FOLDER", help="--output of a run of reclip segment: its model, classes and CLIP"
    )
    add_clip_arguments(parser, given_by="--model")
    parser.add_argument(
        "--output", metavar="FOLDER", help="keep what is learnt on the page (default: a folder that goes at the end)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: %(default)s)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a further name that the page is opened by, such as that of a proxy; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--max-megapixels", type=int, default=APP_MEGAPIXELS, metavar="N",
        help="refuse images of more pixels, in millions (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-megabytes", type=int, default=APP_MEGABYTES, metavar="N",
        help="refuse larger image files, in MiB (default: %(default)s)",
    )  # fmt: skip
    add_device_arguments(parser)
