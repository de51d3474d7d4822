"""``reclip segment``: from unlabelled images and a class file to masks and a trained model."""

from __future__ import annotations

import argparse

from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.cli.output import TerminalProgress, check_problems, print_field, print_images, print_result
from reclip_d2.workspace.options import SegmentOptions, check_geo_options, geo_keys
from reclip_d2.workspace.segment import SegmentRun

STEPS = {
    "maskclip": "masks by MaskCLIP, no training",
    "rectified": "hypotheses, first masks (MaskCLIP), rectification (ReCLIP++), masks",
    "student": "hypotheses, first masks (MaskCLIP), rectification (ReCLIP++), distillation, masks",
}
KEEPS = {
    "best": "the best masks by a judgement without labels",
    "rectified": "the trained model's masks",
    "maskclip": "CLIP's own masks",
}


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    options = SegmentOptions(
        background=args.background,
        formats=tuple(args.formats),
        overwrite=args.overwrite,
        device=args.device,
        opts=(*geo_keys(args.bands, args.stretch), *args.opts),
        fast=args.fast,
        student=args.student,
        keep=args.keep,
        method=args.method,
        clip=args.clip,
        pretrained=args.pretrained,
        iterations=args.iterations,
        student_iterations=args.student_iterations,
        student_weights=args.student_weights,
        tile=args.tile,
        bank=args.bank,
        shard=args.shard,
        engine=args.engine,
        workers=args.workers,
    )
    segment_run = SegmentRun(args.images, args.classes, args.output, options)
    check_geo_options(args.bands, args.stretch, any(image.is_scene for image in segment_run.images))
    _announce(segment_run)
    if segment_run.shard is not None:
        complete = segment_run.prepare_shard(TerminalProgress())
        then = "run the command without --shard to train" if complete else "run the other shards, then without --shard"
        print(f"\nshard {segment_run.shard} is done: {then}")
        return 0
    result = segment_run.segment(TerminalProgress())
    print_result(result)
    check_problems(result, args.skip_broken)
    if not args.fast:
        folder = result.folder.path
        print_field("model", f"{folder}: reclip predict IMAGES --model {folder} --output FOLDER")
    return 0


def _announce(run: SegmentRun) -> None:
    options, classes = run.options, run.classes
    print_images(run.found)
    print_field("classes", f"{len(classes.classes)}: {_shorten(', '.join(run.request.table.mask_classes.names))}")
    if classes.background:
        word = "one class" if options.background == "keep" else "ignored"
        print_field("", f"{word}: {_shorten(', '.join(classes.background))}")
    weights = "" if options.clip == EMBEDDED_MODEL_NAME else f", weights {options.pretrained}"
    print_field("CLIP", f"{options.clip}{weights}")
    print_field("device", run.configs[run.kinds[0]].MODEL.DEVICE)
    print_field("steps", STEPS[run.request.kind])
    if not options.fast:
        print_field("keep", KEEPS[options.keep])
    print_field("output", run.folder.path)


def _shorten(text: str, length: int = 90) -> str:
    return text if len(text) <= length else f"{text[: length - 4].rsplit(', ', 1)[0]}, ..."
