"""Which CLIP: arguments that subcommands share. No import of Detectron2 here: ``reclip doctor`` runs without it."""

from __future__ import annotations

import argparse

from reclip_d2.clip.embedded import EMBEDDED_MODEL_NAME

DEFAULT_CLIP, DEFAULT_PRETRAINED = "ViT-B-16-quickgelu", "openai"


def add_clip_arguments(parser: argparse.ArgumentParser, given_by: str | None = None) -> None:
    """Which CLIP.

    Args:
        given_by: an option that brings a CLIP of its own; the defaults are then None, so that they can be told from
            what the user has said, and the command takes :data:`DEFAULT_CLIP` and :data:`DEFAULT_PRETRAINED` itself.
    """
    unless = "" if given_by is None else f" unless {given_by} gives it"
    parser.add_argument(
        "--clip",
        default=DEFAULT_CLIP if given_by is None else None,
        metavar="NAME",
        help=f"open_clip's name of the model (default: {DEFAULT_CLIP}{unless}); {EMBEDDED_MODEL_NAME} is a toy that"
        " ships with the package and knows 12 materials",
    )
    parser.add_argument(
        "--pretrained",
        default=DEFAULT_PRETRAINED if given_by is None else None,
        metavar="FILE|TAG",
        help="its weights: a local file, or an open_clip tag, which is downloaded"
        f" (default: {DEFAULT_PRETRAINED}{unless})",
    )
