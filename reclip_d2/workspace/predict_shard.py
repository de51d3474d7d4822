"""``reclip predict --shard I/N``: one part of the images, into an output folder that the other parts share.

The run that finds no mask missing writes the summary and the formats with one file for all images; so does a run
without ``--shard``. An image's mask does not depend on the part that makes it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reclip_d2.data.image_folder import ImageFile
from reclip_d2.engine.logs import logging_to
from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, write_formats
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.progress import ProgressCallback, report_to, say
from reclip_d2.workspace.results import RunResult, report_transparency, summarize, write_results
from reclip_d2.workspace.run_folder import ANEW, RunFolder, begin_results
from reclip_d2.workspace.run_state import MASKS
from reclip_d2.workspace.scenes import predict_images
from reclip_d2.workspace.shard_lock import running_shard, shard_lock, shared_state

if TYPE_CHECKING:
    from reclip_d2.workspace.predict import PredictRun

_PROBLEMS = {"type": "object", "additionalProperties": {"type": "string"}}


def predict_shard(run: PredictRun, progress: ProgressCallback | None) -> RunResult:
    """Write the masks of the run's shard, and the summary if they were the last ones."""
    folder, shard, mine = run.folder, run.shard, run.mine
    with report_to(progress):
        with _holding_shard(run) as unfetched:
            made = [image.image_id for image in folder.missing_masks(mine, run.request.results)]
            with logging_to(folder.run / "shards" / shard.name):
                report_transparency(mine)
                run.prune()
                problems = _write(run, [image for image in mine if image.image_id not in unfetched]) | unfetched
        with shared_state(folder.path):
            return _finish(run, problems, made)


@contextlib.contextmanager
def _holding_shard(run: PredictRun) -> Iterator[dict[str, str]]:
    """Hold the shard's lock, and record the run; gives the reason for each image that could not be fetched."""
    folder, request = run.folder, run.request
    with shard_lock(folder.path, run.shard):
        folder.check_links()
        unfetched = run.fetch(run.mine)
        with shared_state(folder.path):
            known = folder.read()
            if known is not None and known.results not in ({}, request.results):
                raise ReclipError(
                    f"{folder.path} has masks of {' '.join(known.results.values())}, and shards do not move them aside:"
                    " name another --output"
                )
            state = run.remember(run.mine)
            entries = [MASKS, *(name for name in request.formats if FORMATS[name].is_per_image())]
            begin_results(folder, state, request.results, entries)
        yield unfetched


def _write(run: PredictRun, mine: Sequence[ImageFile]) -> dict[str, str]:
    """Masks of the images, and formats with one file per image; returns the reason for each image without a mask."""
    folder, request = run.folder, run.request
    scores = folder.path / "scores" if "scores" in request.formats else None
    say("masks", f"shard {run.shard}: {len(mine):,} of {len(run.images):,} images")
    problems = predict_images(
        lambda: run.load(request.kind), mine, request.reading, request.table, folder.masks, scores, run.shard
    )
    usable = {image.name: image.available for image in mine if image.image_id not in problems}
    formats = [name for name in request.formats if name != "scores" and FORMATS[name].is_per_image()]
    if formats and usable:
        say("formats", ", ".join(formats))
        write_formats(folder.masks, usable, folder.path, formats, tidy=False)
    return problems


def _finish(run: PredictRun, problems: Mapping[str, str], made: Sequence[str]) -> RunResult:
    """Record the images without masks; write the summary if no shard has work left."""
    folder, request = run.folder, run.request
    mine = {image.image_id for image in run.mine}
    known = {key: reason for key, reason in _read_problems(folder).items() if key not in mine} | dict(problems)
    with atomic_write(_problems_file(folder)) as temporary:
        temporary.write_text(json.dumps(known), encoding="utf-8")
    lacking = [i for i in folder.missing_masks(run.images, request.results) if i.image_id not in known]
    if lacking or running_shard(folder.path):
        usable = [image for image in run.mine if image.image_id not in problems]
        result = summarize(folder, request, run.mine, usable, problems, set(made), None, lacking=len(lacking))
        say("masks", f"{len(lacking):,} images have no mask yet: run the other shards")
        return result
    known = {image.image_id: known[image.image_id] for image in run.images if image.image_id in known}
    result = write_results(folder, folder.read(), request, run.images, known, run.load, new=made)
    run.remove_copies()
    return result


def _problems_file(folder: RunFolder) -> Path:
    return folder.run / "problems.json"


def _read_problems(folder: RunFolder) -> dict[str, str]:
    file = _problems_file(folder)
    return read_json(file, _PROBLEMS, "list of images without masks", ANEW) if file.exists() else {}
