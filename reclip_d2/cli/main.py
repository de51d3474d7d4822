"""The command ``reclip`` and its subcommands."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from reclip_d2.cli.arguments import COMMANDS
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.utils.lazy_transformers import install_finder
from reclip_d2.workspace.options import in_options

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


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="reclip",
        description="Semantic segmentation of your own images from class names, without labels.",
        epilog="Run reclip COMMAND --help for the arguments of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
    return parser


def _run(arguments: Sequence[str]) -> int:
    args = build_parser().parse_args(arguments)
    try:
        implementation = importlib.import_module(COMMANDS[args.command].implementation)
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    return implementation.run(args)


@exit_on_error(interrupted="interrupted: repeat the command to resume", words=in_options)
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 0, 1 or 2 after a user's error, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    install_finder()
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
