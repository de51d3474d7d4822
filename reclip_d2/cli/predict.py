"""``reclip predict``: write masks of more images with a model trained by ``reclip segment``."""

from __future__ import annotations

import argparse

from reclip_d2.cli.output import TerminalProgress, check_problems, print_field, print_images, print_result
from reclip_d2.data.video import is_video
from reclip_d2.errors import ReclipError
from reclip_d2.workspace.options import TITLES, PredictOptions, check_geo_options, geo_keys
from reclip_d2.workspace.predict import PredictRun
from reclip_d2.workspace.predict_video import predict_video


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    options = PredictOptions(
        background=args.background,
        formats=tuple(args.formats),
        overwrite=args.overwrite,
        device=args.device,
        opts=(*geo_keys(args.bands, args.stretch), *args.opts),
        use=args.use,
        pretrained=args.pretrained,
        shard=args.shard,
        engine=args.engine,
        workers=args.workers,
    )
    video = any(is_video(path) for path in args.images)
    if video and args.engine != "local":
        raise ReclipError("--engine ray: a video is predicted in order, by one process; omit --engine")
    if video and args.shard is not None:
        raise ReclipError("--shard: a video is predicted in one part; cut it, or omit --shard")
    prediction = None if video else PredictRun(args.images, args.model, args.output, options)
    scenes = prediction is not None and any(image.is_scene for image in prediction.images)
    check_geo_options(args.bands, args.stretch, scenes)
    if prediction is None:
        return _predict_video(args, options)
    _announce(prediction)
    result = prediction.predict(TerminalProgress())
    print_result(result)
    check_problems(result, args.skip_broken)
    return 0


def _predict_video(args: argparse.Namespace, options: PredictOptions) -> int:
    if len(args.images) > 1:
        raise ReclipError("IMAGES: give one video, or images; several videos need a command each")
    result = predict_video(args.images[0], args.model, args.output, options, progress=TerminalProgress())
    print(f"\n{result.frames:,} masks by {TITLES[result.kind]} ({result.made:,} new)")
    for name, share in result.shares.items():
        print(f"  {name}  {100 * share:.1f} %")
    print_field("masks", f"{result.folder / 'masks'} (index PNGs, one per frame)")
    print_field("overlay", result.overlay)
    return 0


def _announce(run: PredictRun) -> None:
    print_images(run.found)
    print_field("model", f"{TITLES[run.model.kind]}, {run.model.folder.path}")
    print_field("device", run.cfg.MODEL.DEVICE)
    if run.shard is not None:
        print_field("shard", f"{run.shard}: {len(run.mine):,} images")
    print_field("output", run.folder.path)
