"""``reclip segment``: from a folder of unlabelled images and a class file to masks and a trained model."""

from __future__ import annotations

import argparse

from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.cli.output import TerminalProgress, check_problems, print_images, print_result
from reclip_d2.workspace.options import SegmentOptions
from reclip_d2.workspace.segment import SegmentRun

STEPS = {
    "maskclip": "masks by MaskCLIP, no training",
    "rectified": "hypotheses, rectification (ReCLIP++), masks",
    "student": "hypotheses, rectification (ReCLIP++), distillation, masks by the student",
}


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    options = SegmentOptions(
        background=args.background,
        formats=tuple(args.formats),
        overwrite=args.overwrite,
        device=args.device,
        opts=tuple(args.opts),
        fast=args.fast,
        student=args.student,
        clip=args.clip,
        pretrained=args.pretrained,
        iterations=args.iterations,
        student_iterations=args.student_iterations,
        student_weights=args.student_weights,
        tile=args.tile,
    )
    segment_run = SegmentRun(args.images, args.classes, args.output, options)
    _announce(segment_run)
    result = segment_run.segment(TerminalProgress())
    print_result(result)
    check_problems(result, args.skip_broken)
    if not args.fast:
        folder = result.folder.path
        print(f"model     {folder}: reclip predict IMAGES --model {folder} --output FOLDER")
    return 0


def _announce(run: SegmentRun) -> None:
    """Say what will be done."""
    options, classes = run.options, run.classes
    print_images(run.found)
    print(f"classes   {len(classes.classes)}: {_shorten(', '.join(run.request.table.mask_classes.names))}")
    if classes.background:
        word = "a class of its own" if options.background == "keep" else "ignored"
        print(f"          {word}: {_shorten(', '.join(classes.background))}")
    weights = "" if options.clip == EMBEDDED_MODEL_NAME else f", weights {options.pretrained}"
    print(f"CLIP      {options.clip}{weights}")
    print(f"device    {run.configs[run.kinds[0]].MODEL.DEVICE}")
    print(f"steps     {STEPS[run.request.kind]}")
    print(f"output    {run.folder.path}", flush=True)


def _shorten(text: str, length: int = 90) -> str:
    return text if len(text) <= length else f"{text[: length - 4].rsplit(', ', 1)[0]}, ..."
