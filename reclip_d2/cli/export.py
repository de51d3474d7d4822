"""``reclip export``: write a trained model to one file that runs without this package."""

from __future__ import annotations

import argparse
import re

from reclip_d2.cli.output import print_field
from reclip_d2.errors import ReclipError
from reclip_d2.export.export import ExportOptions
from reclip_d2.export.int8 import Int8Options
from reclip_d2.hypothesis.class_pruning import chosen_rules
from reclip_d2.workspace.export import Export, ExportSource
from reclip_d2.workspace.options import TITLES


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    options = ExportOptions(
        format=args.format,
        size=None if args.size is None else parse_size(args.size),
        labels=args.labels,
        input_type=args.input_type,
        tolerance=args.tolerance,
        int8=_int8(args),
    )
    options.check()
    source = _source(args)
    export = Export(
        source,
        options,
        args.output,
        overwrite=args.overwrite,
        calibrate=args.calibrate,
        calibration_images=args.calibration_images,
    )
    _announce(source, options)
    if (images := export.calibration) is not None:
        print_field("INT8", f"calibrated by {args.calibration} on {len(images):,} of {images.found:,} images")
    classes = export.write(report=lambda line: print_field("check", line))
    print_field("file", f"{export.path} ({export.path.stat().st_size / 2**20:.1f} MiB)")
    print_field("classes", classes)
    return 0


def _int8(args: argparse.Namespace) -> Int8Options | None:
    """Options of the quantisation; None for float32."""
    if not args.int8:
        if args.force or args.reduce_range:
            raise ReclipError("--force and --reduce-range are for --int8")
        return None
    return Int8Options(args.calibration, args.reduce_range, args.min_agreement, args.force)


def _announce(source: ExportSource, options: ExportOptions) -> None:
    size = "any size" if options.size is None else f"{options.size[0]} x {options.size[1]}"
    output = "labels" if options.labels else "logits"
    print_field("model", f"{TITLES[source.kind]}{f', {source.weights}' if source.weights else ''}")
    print_field("format", f"{options.format}, {size}, {options.input_type} in, {output} out")
    if keys := [rule.key for rule in chosen_rules(source.cfg)]:
        print_field("left out", f"{', '.join(keys)}: files have all classes")
    if source.cfg.TEST.REFINE:
        print_field("left out", f"TEST.REFINE {', '.join(source.cfg.TEST.REFINE)}: files contain the network alone")


def _source(args: argparse.Namespace) -> ExportSource:
    """The model of the arguments."""
    keep, opts = args.background == "keep", args.opts
    if args.model is not None:
        if args.weights is not None:
            raise ReclipError("--weights is for --config-file: a --model folder has its own weights")
        return ExportSource.of_run(
            args.model, use=args.use, pretrained=args.pretrained, keep_background=keep, opts=opts
        )
    if args.use is not None:
        raise ReclipError("--use is for --model: a --config-file has only one model")
    return ExportSource.of_config(
        args.config_file, weights=args.weights, pretrained=args.pretrained, keep_background=keep, opts=opts
    )


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``HxW`` to (H, W).

    Raises:
        ReclipError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if found is None or 0 in (size := (int(found[1]), int(found[2]))):
        raise ReclipError(f"--size {text}: give height and width in pixels, such as 512x683")
    return size
