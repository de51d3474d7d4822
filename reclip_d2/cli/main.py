"""The command ``reclip`` and its subcommands."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.workspace.options import in_options

# Subcommands and their help. Arguments are in reclip_d2.cli.arguments.COMMAND. The implementation is run(args) in
# reclip_d2.cli.COMMAND or IMPLEMENTATIONS[COMMAND], which is imported after the arguments have been parsed.
COMMANDS: dict[str, str] = {
    "segment": "train on your images, without labels, and write their masks",
    "predict": "write masks of more images with a model trained by segment",
    "export": "write a trained model to an ONNX or TorchScript file",
    "app": "serve a browser page to try class names on images, and to see masks and bias",
    "doctor": "list what is installed, what is missing, and where CLIP's weights go",
}
IMPLEMENTATIONS = {"app": "reclip_d2.app.command"}

# PyPI has no official release of Detectron2.
INSTALL_DETECTRON2 = "python -m reclip_d2.install_detectron2"


def missing_package(error: ModuleNotFoundError) -> ReclipError:
    """The error for a package that is not installed; failed imports of the project's modules are bugs, and raised."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "reclip_d2"):
        raise error
    if package == "detectron2":
        missing = error.name if error.name == "detectron2._C" else package
        return ReclipError(f"{missing} is not installed: run {INSTALL_DETECTRON2}")
    return ReclipError(f"the Python module {package} is not installed: reinstall reclip_d2 with pip")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of ``command`` only."""
    parser = argparse.ArgumentParser(
        prog="reclip",
        description="Semantic segmentation of your own images from class names alone, without labels.",
        epilog="Run reclip COMMAND --help for the arguments of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == command:
            arguments = importlib.import_module(f"reclip_d2.cli.arguments.{name}")
            sub.description = arguments.DESCRIPTION
            arguments.add_arguments(sub)
    return parser


def _implementation(command: str) -> ModuleType:
    try:
        return importlib.import_module(IMPLEMENTATIONS.get(command, f"reclip_d2.cli.{command}"))
    except ModuleNotFoundError as error:
        raise missing_package(error) from error


def _run(arguments: Sequence[str]) -> int:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    return _implementation(args.command).run(args)


@exit_on_error(interrupted="interrupted: repeat the command to resume", words=in_options)
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 0, 1 or 2 after a user's error, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
