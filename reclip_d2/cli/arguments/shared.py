"""Arguments shared by several commands."""

from __future__ import annotations

import argparse

from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.formats.registry import FORMATS
from reclip_d2.workspace.options import DEFAULT_CLIP, DEFAULT_PRETRAINED


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, and whether broken ones are an error."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folders (searched recursively), images, globs, or .txt lists of these",
    )
    parser.add_argument("--skip-broken", action="store_true", help="do not fail because of broken images")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Output folder and formats."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help=f"additional formats: {', '.join(name for name in FORMATS if name != 'index')}",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the results of earlier runs, and start over")


def add_background_argument(parser: argparse.ArgumentParser) -> None:
    """How masks treat background names."""
    parser.add_argument(
        "--background",
        choices=["ignore", "keep"],
        default="ignore",
        help="ignore the names of the background: line in masks (default), or keep them as one class",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Device and config overrides."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, see reclip_d2/config/keys.py; must come last",
    )  # fmt: skip


def add_clip_arguments(parser: argparse.ArgumentParser, given_by: str | None = None) -> None:
    """CLIP and its weights.

    Args:
        given_by: another option that chooses the CLIP. The defaults are then None, so that the command can tell whether
            the user gave these arguments.
    """
    unless = "" if given_by is None else f", or that of {given_by}"
    parser.add_argument(
        "--clip",
        default=DEFAULT_CLIP if given_by is None else None,
        metavar="NAME",
        help=f"open_clip's name of the model, or a JSON file of its architecture (default: {DEFAULT_CLIP}{unless});"
        f" {EMBEDDED_MODEL_NAME} is a toy model for 12 materials that ships with the package",
    )
    parser.add_argument(
        "--pretrained",
        default=DEFAULT_PRETRAINED if given_by is None else None,
        metavar="FILE|TAG",
        help=f"its weights: a local file, or an open_clip tag to download (default: {DEFAULT_PRETRAINED}{unless})",
    )
