"""Descriptions and arguments of the commands.

This module does not import torch, NumPy or Detectron2, directly or indirectly, so that help and argument errors come
without delay. Choices and defaults of slow modules are repeated here; a test compares them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.formats.registry import FORMATS
from reclip_d2.workspace.options import (
    DEFAULT_CLIP,
    DEFAULT_METHOD,
    DEFAULT_PRETRAINED,
    ENGINES,
    KEEP,
    METHODS,
    TITLES,
    SegmentOptions,
)

# FORMATS and INPUT_TYPES of reclip_d2.export.export, METHODS of reclip_d2.export.int8, and defaults of their options.
# These modules take seconds to import. A test compares them.
EXPORT_FORMATS = ("onnx", "torchscript")
EXPORT_INPUT_TYPES = ("uint8", "float32")
COMPLETION_SHELLS = ("bash", "zsh", "tcsh")  # of shtab
EXPORT_TOLERANCE = 1e-3
INT8_METHODS, INT8_METHOD, INT8_AGREEMENT = ("minmax", "percentile", "entropy"), "minmax", 0.98
# Limits for images: the defaults of reclip_d2.app.guard.Limits, which takes seconds to import. A test compares them.
APP_MEGAPIXELS, APP_MEGABYTES = 50, 64


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand of ``reclip``.

    Attributes:
        help: its line in the help of ``reclip``.
        description: the beginning of its own help.
        add_arguments: adds its arguments to a parser.
        implementation: module with ``run(args) -> int``, imported after the arguments have been parsed.
    """

    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    implementation: str


# ---- shared by several commands --------------------------------------------------------------------------------


def _add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, and whether broken ones are an error."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folders (searched recursively), images, globs, URLs of these, or .txt, .csv or .parquet lists",
    )
    parser.add_argument("--skip-broken", action="store_true", help="do not fail because of broken images")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
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


def _add_shard_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """A part of the work."""
    parser.add_argument(
        "--shard", metavar="I/N",
        help=f"{what}; other machines compute the other parts, into the same --output",
    )  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Where ``what`` is made."""
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="local",
        help=f"make {what} in this process (local), or on Ray, over the processes of this machine or the cluster of"
        " RAY_ADDRESS (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N", help="worker processes of Ray (default: one per GPU or CPU)"
    )


def _add_geo_arguments(parser: argparse.ArgumentParser) -> None:
    """How GeoTIFFs are read."""
    parser.add_argument(
        "--bands", nargs="+", type=int, metavar="N",
        help="bands of GeoTIFFs for red, green and blue, from 1, or one for grey (default: the file's colours, or its"
        " first three bands)",
    )  # fmt: skip
    parser.add_argument(
        "--stretch", nargs="+", metavar="WHAT",
        help="how bands of GeoTIFFs become 8 bits: two percentiles, minmax, or none for the range of their type"
        " (default: none for 8 bits, else 2 98)",
    )  # fmt: skip


def _add_background_argument(parser: argparse.ArgumentParser) -> None:
    """How masks treat background names."""
    parser.add_argument(
        "--background",
        choices=["ignore", "keep"],
        default="ignore",
        help="ignore the names of the background: line in masks (default), or keep them as one class",
    )


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Device and config overrides."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, see reclip_d2/config/keys.py; must come last",
    )  # fmt: skip


def _add_clip_arguments(parser: argparse.ArgumentParser, given_by: str | None = None) -> None:
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


# ---- commands ---------------------------------------------------------------------------------------------------


def _add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    _add_image_arguments(parser)
    parser.add_argument("--classes", required=True, metavar="FILE", help="class file")
    _add_output_arguments(parser)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="write CLIP's own masks (MaskCLIP), without training")
    depth.add_argument("--student", action="store_true", help="distil a student, and predict with it")
    _add_background_argument(parser)
    parser.add_argument(
        "--keep", choices=list(KEEP), default=SegmentOptions.keep,
        help="whose masks to keep after training: the best by a judgement without labels, the trained model's"
        " (rectified), or CLIP's own (maskclip) (default: %(default)s)",
    )  # fmt: skip
    _add_clip_arguments(parser)
    parser.add_argument(
        "--method", choices=list(METHODS), default=DEFAULT_METHOD,
        help="rectification method, a file of configs/methods; reclippp_rectify is ReCLIP++ as published, slow on a CPU"
        " (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, metavar="N", help="iterations of the rectification (default: by number of images)"
    )
    parser.add_argument(
        "--student-iterations", type=int, metavar="N",
        help="iterations of the distillation (default: by number of images)",
    )  # fmt: skip
    parser.add_argument(
        "--student-weights",
        metavar="FILE|NAME",
        help="initial weights of the student's backbone (default: the config's)",
    )
    add_engine_arguments(parser, "masks, hypotheses and features")
    _add_shard_argument(parser, "compute only part I of N of hypotheses and features, and stop before the training")
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS",
        help="cut images with a longer side, and GeoTIFFs, into tiles of this size",
    )  # fmt: skip
    _add_geo_arguments(parser)
    parser.add_argument(
        "--bank", action="store_true",
        help="make a bank of features from the images, without labels, and refine the masks with it (TEST.REFINE bank)",
    )  # fmt: skip
    _add_device_arguments(parser)


def _add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    _add_image_arguments(parser)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="output folder of reclip segment, or a saved model"
    )
    _add_output_arguments(parser)
    parser.add_argument("--use", choices=list(TITLES), help="model to use (default: the one whose masks were kept)")
    add_engine_arguments(parser, "masks")
    _add_shard_argument(parser, "predict only part I of N of the images")
    _add_background_argument(parser)
    _add_geo_arguments(parser)
    parser.add_argument(
        "--pretrained", metavar="FILE|TAG", help="CLIP's weights, if they have moved since the training"
    )
    _add_device_arguments(parser)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FOLDER", help="output folder of reclip segment, or a saved model")
    source.add_argument(
        "--config-file",
        action="append",
        metavar="FILE",
        help="config file of a model trained by train_net.py; repeat it as for train_net.py",
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint for --config-file (default: MODEL.WEIGHTS)")
    parser.add_argument("--use", choices=list(TITLES), help="model to export from --model (default: the kept one)")
    parser.add_argument("--format", required=True, choices=list(EXPORT_FORMATS))
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--size", metavar="HxW", help="fixed image size, such as 512x683; avoids a bicubic resize")
    shape.add_argument("--dynamic", action="store_true", help="images of any size (default)")
    parser.add_argument("--labels", action="store_true", help="return labels (1, height, width) instead of logits")
    _add_background_argument(parser)
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
    _add_int8_arguments(parser)
    parser.add_argument(
        "--pretrained", metavar="FILE|TAG", help="CLIP's weights, if they have moved since the training"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )


def _add_int8_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("INT8, for students in ONNX")
    group.add_argument("--int8", action="store_true", help="quantise weights and activations to 8 bits")
    group.add_argument(
        "--calibrate", metavar="IMAGES", help="images like those to predict, a folder or a list; labels are not needed"
    )
    group.add_argument(
        "--calibration-images", type=int, default=100, metavar="N",
        help="use at most N of them, chosen at equal steps (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--calibration", choices=list(INT8_METHODS), default=INT8_METHOD,
        help="how ranges of activations are chosen (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--reduce-range", action="store_true", help="7-bit weights, for x86 CPUs without VNNI instructions"
    )
    group.add_argument(
        "--min-agreement", type=float, default=INT8_AGREEMENT, metavar="X",
        help="smallest fraction of the images' pixels with the float32 label; files below are removed"
        " (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--force", action="store_true", help="keep a file below --min-agreement")


def _add_app_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", help="output folder of reclip segment: use its model, classes and CLIP"
    )
    _add_clip_arguments(parser, given_by="--model")
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
    _add_device_arguments(parser)


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    _add_clip_arguments(parser)
    parser.add_argument(
        "--install-detectron2",
        action="store_true",
        help="first install Detectron2 0.5 if it is missing; see python -m reclip_d2.install_detectron2 --help",
    )


def _add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=list(COMPLETION_SHELLS))


COMMANDS: dict[str, Command] = {
    "segment": Command(
        "train on your images, without labels, and write their masks",
        """\
Train on your own images, without labels, and write a mask for each.

The class file has one class per line. Names after the first, separated by commas,
are synonyms, whose text features are averaged; after a semicolon follows another
query of the class, which has the maximum of their logits. # starts a comment. A line
`background: sky, wall` lists what else may be in the images: masks ignore it (255),
or have it as one class with --background keep.

Masks are index PNGs below FOLDER/masks, in the same subfolders as the images: 0 is
the first class of the file, 255 is ignored. Interrupted runs resume when you repeat
the command.""",
        _add_segment_arguments,
        "reclip_d2.cli.segment",
    ),
    "predict": Command(
        "write masks of more images with a model trained by segment",
        """\
Write masks of images with a model trained by `reclip segment`.

Masks and other formats are written below FOLDER, as by `reclip segment`. Existing
masks are kept: repeat the command to resume, or after adding images.

GeoTIFFs (pip install "reclip_d2[geo]") are read in windows; their masks are GeoTIFFs
with the same georeference, and nodata 255.""",
        _add_predict_arguments,
        "reclip_d2.cli.predict",
    ),
    "export": Command(
        "write a trained model to an ONNX or TorchScript file",
        """\
Write a trained model to one file that runs without this package: ONNX or TorchScript.

The exported model takes an RGB image (1, 3, height, width) with values from 0 to
255, of any size or of --size, and returns logits or labels at the image's size. The
command runs the file and compares it with the model before it keeps it. classes.json
in the same folder describes input and output.

A student can be quantised to INT8 with images of yours: --int8 --calibrate FOLDER.""",
        _add_export_arguments,
        "reclip_d2.cli.export",
    ),
    "app": Command(
        "serve a browser page to try class names on images, and to see masks and bias",
        """\
Serve a browser page: drop images, type class names, see CLIP's own masks; learn the
bias from the images, see it, and compare the masks before and after.

Only this machine can reach the page unless --host is given; the page loads nothing
from other hosts. Press Ctrl-C to stop. Needs gradio: pip install "reclip_d2[app]".""",
        _add_app_arguments,
        "reclip_d2.app.command",
    ),
    "doctor": Command(
        "list what is installed, what is missing, and where CLIP's weights go",
        """\
List what is installed and what is missing. The exit status is 0 if `reclip segment`
can run with this --clip and --pretrained, and 1 otherwise.""",
        _add_doctor_arguments,
        "reclip_d2.cli.doctor",
    ),
    "completion": Command(
        "print the completion script of a shell",
        """\
Print a script that completes the command's arguments in a shell:

    reclip completion bash > ~/.local/share/bash-completion/completions/reclip
    reclip completion zsh > "${fpath[1]}/_reclip"

Needs shtab: pip install "reclip_d2[completion]".""",
        _add_completion_arguments,
        "reclip_d2.cli.completion",
    ),
}
