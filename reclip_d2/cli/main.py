"""The command ``reclip`` and its subcommands."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.workspace.options import in_options

# Subcommand: its line in the help. Arguments are in reclip_d2.cli.arguments.COMMAND; the implementation is run(args)
# of reclip_d2.cli.COMMAND or of IMPLEMENTATIONS[COMMAND], imported once the arguments are known to be right.
COMMANDS: dict[str, str] = {
    "segment": "train on a folder of your images, and write their masks",
    "predict": "write the masks of further images, with a model that segment has trained",
    "export": "write a trained model to an ONNX or TorchScript file",
    "app": "serve a page for the browser: try class names on images, see the bias and the masks",
    "doctor": "say what is installed, what is missing, and where CLIP's weights go",
}
IMPLEMENTATIONS = {"app": "reclip_d2.app.command"}

# PyPI has no release of Detectron2 under its own name.
INSTALL_DETECTRON2 = "python -m reclip_d2.install_detectron2"


def missing_package(error: ModuleNotFoundError) -> ReclipError:
    """The line for an import that failed since a package is not installed; an error of our own modules is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "reclip_d2"):
        raise error
    if package == "detectron2":
        missing = error.name if error.name == "detectron2._C" else package
        return ReclipError(f"{missing} is not installed: {INSTALL_DETECTRON2} installs it")
    return ReclipError(
        f"the Python module {package} is not installed: install reclip_d2 again with pip, which brings it"
    )


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only ``command`` has its arguments."""
    parser = argparse.ArgumentParser(
        prog="reclip",
        description="Semantic segmentation of your own images from class names alone, without labels.",
        epilog="reclip COMMAND --help says more about a command.",
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


@exit_on_error(interrupted="interrupted: the same command goes on from here", words=in_options)
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; its exit status is 0, 1 after an error that is no bug, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
