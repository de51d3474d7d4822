"""Arguments that commands share."""

from __future__ import annotations

import argparse

from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.formats.registry import FORMATS
from reclip_d2.workspace.options import DEFAULT_CLIP, DEFAULT_PRETRAINED


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGES and what to do with broken ones."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folders (searched recursively), images, globs, or .txt lists of these",
    )
    parser.add_argument("--skip-broken", action="store_true", help="broken images are no error: list them, exit with 0")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where results go, and in which formats."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where everything goes")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help=f"beside the index masks: {', '.join(name for name in FORMATS if name != 'index')}",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run has left, and start anew")


def add_background_argument(parser: argparse.ArgumentParser) -> None:
    """What becomes of background names."""
    parser.add_argument(
        "--background",
        choices=["ignore", "keep"],
        default="ignore",
        help="the names of the background: line are ignored in masks (default), or kept as one class",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Device, and any config key."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="any keys of reclip_d2/config/keys.py; must come last",
    )  # fmt: skip


def add_clip_arguments(parser: argparse.ArgumentParser, given_by: str | None = None) -> None:
    """Which CLIP.

    Args:
        given_by: an option that brings a CLIP of its own; the defaults are then None, so that they can be told from
            what the user has said, and the command takes the names of ``names.py`` itself.
    """
    unless = "" if given_by is None else f" unless {given_by} gives it"
    parser.add_argument(
        "--clip",
        default=DEFAULT_CLIP if given_by is None else None,
        metavar="NAME",
        help=f"open_clip's name of the model, or the JSON file of its architecture (default: {DEFAULT_CLIP}{unless});"
        f" {EMBEDDED_MODEL_NAME} is a toy that ships with the package and knows 12 materials",
    )
    parser.add_argument(
        "--pretrained",
        default=DEFAULT_PRETRAINED if given_by is None else None,
        metavar="FILE|TAG",
        help="its weights: a local file, or an open_clip tag, which is downloaded"
        f" (default: {DEFAULT_PRETRAINED}{unless})",
    )
