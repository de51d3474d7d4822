"""``reclip predict``: masks of further images, with a model that ``reclip segment`` has trained."""

from __future__ import annotations

import argparse

from reclip_d2.cli.output import TerminalProgress, check_problems, print_images, print_result
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
    print_images(prediction.found)
    print(f"model     {TITLES[prediction.model.kind]}, {prediction.model.folder.path}")
    print(f"device    {prediction.cfg.MODEL.DEVICE}")
    print(f"output    {prediction.folder.path}", flush=True)
    result = prediction.predict(TerminalProgress())
    print_result(result)
    check_problems(result, args.skip_broken)
    return 0
