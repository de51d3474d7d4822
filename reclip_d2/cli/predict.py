"""``reclip predict``: masks of further images, with a model that ``reclip segment`` has trained."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence

from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.image_folder import ImageFile, find_images
from reclip_d2.engine.logs import logging_to
from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import current_digest, file_digest
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.workspace import options
from reclip_d2.workspace.names import TITLES
from reclip_d2.workspace.results import Request, write_results
from reclip_d2.workspace.run_folder import CHECKPOINT, RunFolder, check_same_inputs
from reclip_d2.workspace.run_state import RunState
from reclip_d2.workspace.trained_model import TrainedModel


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    folder = RunFolder(check_output_folder(args.output))
    source = RunFolder(args.model).path
    if folder.path == source:
        raise ReclipError(f"--output {args.output} is the model's own folder: name another")
    if folder.path in source.parents:
        raise ReclipError(f"--output {args.output} holds the model's folder {source}: name another")
    model = TrainedModel.find(args.model, args.use, args.pretrained)
    cfg = model.config(["MODEL.DEVICE", options.resolve_device(args.device), *args.opts])
    kind, trained = model.kind, model.state

    found = find_images(args.images, exclude=[folder.path])
    images = found.images
    classes = trained.classes
    request = Request(kind, classes, background=args.background, formats=args.formats, skip_broken=args.skip_broken)
    request.check(images)
    settings = {**options.settings_of(cfg), CHECKPOINT: file_digest(model.weights)}
    wanted = dataclasses.replace(trained, settings={kind: settings}, results={}, entries=[])
    folder.is_used()  # a folder of other things is left alone
    with folder.lock(), contextlib.ExitStack() as stack:
        if args.overwrite:
            folder.clear()
        folder.check_links()
        state = _remember(folder, model, args.overwrite, wanted, images)
        stack.enter_context(logging_to(folder.run))
        options.announce_images(found)
        print(f"model     {TITLES[kind]}, {model.folder.path}")
        print(f"device    {cfg.MODEL.DEVICE}")
        print(f"output    {folder.path}", flush=True)
        register_images([], classes)
        return write_results(folder, state, request, images, {}, cfg, model.weights)


def _bring_up_to_date(known: RunState, model: TrainedModel) -> None:
    """Replace what an earlier version has recorded of the model's files by their digests."""
    known.weights = current_digest(known.weights, model.pretrained)
    settings = known.settings.get(model.kind, {})
    if settings.get(CHECKPOINT):
        settings[CHECKPOINT] = current_digest(settings[CHECKPOINT], model.weights)


def _remember(
    folder: RunFolder, model: TrainedModel, overwrite: bool, wanted: RunState, images: Sequence[ImageFile]
) -> RunState:
    """The folder's state with this run in it; refuses a folder of another model, or of other images."""
    known = None if overwrite else folder.read()
    if known is not None:
        _bring_up_to_date(known, model)
        check_same_inputs(folder, known, wanted)
        settings = {**known.settings, **wanted.settings}
        wanted = dataclasses.replace(wanted, settings=settings, results=known.results, entries=known.entries)
    signatures = folder.check_images(images, trained=False)
    folder.write(wanted)
    folder.remember_images(signatures)
    return wanted
