"""Arguments of ``reclip export``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import add_background_argument
from reclip_d2.workspace.options import TITLES

# FORMATS and INPUT_TYPES of reclip_d2.export.export, and the default of its ExportOptions.tolerance. That module takes
# seconds to import. A test compares them.
EXPORT_FORMATS = ("onnx", "torchscript")
EXPORT_INPUT_TYPES = ("uint8", "float32")
EXPORT_TOLERANCE = 1e-3

DESCRIPTION = """\
Write a trained model to one file that runs without this package: ONNX or TorchScript.

The exported model takes an RGB image (1, 3, height, width) with values from 0 to
255, of any size or of --size, and returns logits or labels at the image's size. The
command runs the file and compares it with the model before it keeps it. classes.json
in the same folder describes input and output."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FOLDER", help="output folder of reclip segment, or a saved model")
    source.add_argument(
        "--config-file",
        action="append",
        metavar="FILE",
        help="config file of a model trained by train_net.py; repeat it as for train_net.py",
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint for --config-file (default: MODEL.WEIGHTS)")
    parser.add_argument(
        "--use", choices=list(TITLES), help="model to export from --model (default: the last trained one)"
    )
    parser.add_argument("--format", required=True, choices=list(EXPORT_FORMATS))
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--size", metavar="HxW", help="fixed image size, such as 512x683; avoids a bicubic resize")
    shape.add_argument("--dynamic", action="store_true", help="images of any size (default)")
    parser.add_argument("--labels", action="store_true", help="return labels (1, height, width) instead of logits")
    add_background_argument(parser)
    parser.add_argument(
        "--input-type",
        choices=list(EXPORT_INPUT_TYPES),
        default="uint8",
        help="type of the input image (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="FILE|FOLDER", help="where to write it (default: a folder export next to the checkpoint)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=EXPORT_TOLERANCE,
        metavar="X",
        help="maximum difference from the model's logits, relative to their range (default: %(default)s)",
    )
    parser.add_argument(
        "--pretrained", metavar="FILE|TAG", help="CLIP's weights, if they have moved since the training"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )
