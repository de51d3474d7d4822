"""Arguments of ``reclip export``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.arguments.shared import add_background_argument
from reclip_d2.workspace.options import TITLES

# Keys of reclip_d2.export.export's FORMATS and INPUT_TYPES, and the default of its ExportOptions.tolerance: a test
# compares them. That module takes seconds to import.
EXPORT_FORMATS = ("onnx", "torchscript")
EXPORT_INPUT_TYPES = ("uint8", "float32")
EXPORT_TOLERANCE = 1e-3

DESCRIPTION = """\
Write a trained model to one file that runs without this package: ONNX or TorchScript.

It takes an RGB image (1, 3, height, width) with values from 0 to 255, of any size
unless --size gives one, and returns logits at the image's size, or labels. The file
is run and compared with the model before it gets its name. classes.json beside it
says what goes in and what comes out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FOLDER", help="--output of a run of reclip segment")
    source.add_argument(
        "--config-file",
        action="append",
        metavar="FILE",
        help="config file of a model that train_net.py has trained; repeat it as for train_net.py",
    )
    parser.add_argument("--weights", metavar="FILE", help="its checkpoint (default: MODEL.WEIGHTS of the config)")
    parser.add_argument(
        "--use", choices=list(TITLES), help="which model of --model (default: the last that was trained)"
    )
    parser.add_argument("--format", required=True, choices=list(EXPORT_FORMATS))
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--size", metavar="HxW", help="one size for all images, such as 512x683; no bicubic resize then")
    shape.add_argument("--dynamic", action="store_true", help="images of any size (default)")
    parser.add_argument("--labels", action="store_true", help="return labels (1, height, width) instead of logits")
    add_background_argument(parser)
    parser.add_argument(
        "--input-type", choices=list(EXPORT_INPUT_TYPES), default="uint8", help="of the image (default: %(default)s)"
    )
    parser.add_argument(
        "--output", metavar="FILE|FOLDER", help="(default: in a folder export beside the model's checkpoint)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=EXPORT_TOLERANCE,
        metavar="X",
        help="largest difference from the model's logits, as part of what these span (default: %(default)s)",
    )
    parser.add_argument(
        "--pretrained", metavar="FILE|TAG", help="CLIP's weights, if they are no longer where they were"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="any keys; must come last"
    )
