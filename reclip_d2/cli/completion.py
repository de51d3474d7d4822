"""``reclip completion``: completion scripts of shells, by shtab from the command's own parser."""

from __future__ import annotations

import argparse

from reclip_d2.errors import ReclipError


def run(args: argparse.Namespace) -> int:
    """Print the script; returns the exit status."""
    try:
        import shtab
    except ImportError as error:
        raise ReclipError("shtab is not installed: pip install 'reclip_d2[completion]'") from error
    from reclip_d2.cli.main import build_parser

    print(shtab.complete(build_parser(), shell=args.shell))
    return 0
