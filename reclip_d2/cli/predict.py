"""``reclip predict``: write masks of more images with a model trained by ``reclip segment``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.output import TerminalProgress, check_problems, print_field, print_images, print_result
from reclip_d2.workspace.options import TITLES, PredictOptions
from reclip_d2.workspace.predict import PredictRun


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    options = PredictOptions(
        background=args.background,
        formats=tuple(args.formats),
        overwrite=args.overwrite,
        device=args.device,
        opts=tuple(args.opts),
        use=args.use,
        pretrained=args.pretrained,
    )
    prediction = PredictRun(args.images, args.model, args.output, options)
    _announce(prediction)
    result = prediction.predict(TerminalProgress())
    print_result(result)
    check_problems(result, args.skip_broken)
    return 0


def _announce(run: PredictRun) -> None:
    print_images(run.found)
    print_field("model", f"{TITLES[run.model.kind]}, {run.model.folder.path}")
    print_field("device", run.cfg.MODEL.DEVICE)
    print_field("output", run.folder.path)
