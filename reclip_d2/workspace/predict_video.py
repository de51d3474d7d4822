"""Masks of a video's frames, and the video with the masks over it.

The output folder::

    masks/            index PNGs, one per frame: 000000.png, ...; classes.json
    overlay.mp4       the video with the classes' colours
    video.json        the video, the model and the settings; a repeated command resumes
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from reclip_d2.data.video import Video, write_video
from reclip_d2.errors import ReclipError
from reclip_d2.formats import IndexWriter, Prediction, read_index
from reclip_d2.formats.pictures import blend_colors
from reclip_d2.inference.video import predict_frames
from reclip_d2.utils.digest import file_digest
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.io import atomic_write, remove_leftovers, remove_leftovers_of
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.locks import LOCK_NAME, exclusive
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.utils.progress import ProgressCallback, count_steps, report_to, say
from reclip_d2.workspace.masks import MaskClassTable
from reclip_d2.workspace.options import PredictOptions
from reclip_d2.workspace.run_state import MASKS
from reclip_d2.workspace.stage_config import resolve_device, settings_of
from reclip_d2.workspace.trained_model import TrainedModel

STATE, OVERLAY = "video.json", "overlay.mp4"
_SCHEMA = {"type": "object", "required": ["video", "model", "settings"]}
_OTHER = "give --overwrite, or another --output"


@dataclasses.dataclass(frozen=True)
class VideoResult:
    """The results of a prediction.

    Attributes:
        folder: the output folder.
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        frames: number of frames.
        made: number of masks made by this run; the others existed.
        shares: share of each mask class, by its name; ignored pixels are left out.
    """

    folder: Path
    kind: str
    frames: int
    made: int
    shares: dict[str, float]

    @property
    def overlay(self) -> Path:
        """The video with the masks over it."""
        return self.folder / OVERLAY


def predict_video(
    video: StrPath,
    model: StrPath,
    output: StrPath,
    options: PredictOptions = PredictOptions(),  # noqa: B008 (immutable)
    *,
    progress: ProgressCallback | None = None,
) -> VideoResult:
    """Write the masks of a video's frames, skipping those that exist, and the video with the masks over it.

    ``TEST.VIDEO_WINDOW`` smooths over neighbouring frames.

    Args:
        video: a file that FFmpeg reads.
        model, output, progress: as for :func:`~reclip_d2.workspace.predict.predict`.
        options: with no formats but ``overlay``, which a video always has.

    Raises:
        ReclipError: an input is wrong, or the folder has results of another video or model.
    """
    if other := [name for name in options.formats if name != "overlay"]:
        raise ReclipError(f"--formats {' '.join(other)}: a video has index masks and an overlay, and no other formats")
    folder = check_output_folder(output).resolve()
    trained = TrainedModel.find(model, options.use, options.pretrained)
    cfg = trained.config(["MODEL.DEVICE", resolve_device(options.device), *options.opts])
    source = Video(video)
    state = {
        "video": file_digest(video),
        "model": [trained.kind, "" if trained.kind == "maskclip" else file_digest(trained.weights)],
        "settings": {**settings_of(cfg), "background": options.background, "window": cfg.TEST.VIDEO_WINDOW},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK_NAME, f"{folder} is used by another run: wait, or give another --output"):
        with report_to(progress):
            _claim(folder, state, options.overwrite)
            table = MaskClassTable(trained.state.classes, options.background == "keep")
            predictor = trained.predictor(["MODEL.DEVICE", cfg.MODEL.DEVICE, *options.opts])
            frames, made, pixels = _write_masks(folder, source, predictor, table, cfg.TEST.VIDEO_WINDOW)
            _write_overlay(folder, source, table)
    names = table.mask_classes.names
    counted = max(int(pixels[: len(names)].sum()), 1)
    shares = {name: float(pixels[k] / counted) for k, name in enumerate(names)}
    return VideoResult(folder, trained.kind, frames, made, shares)


def _claim(folder: Path, state: dict[str, Any], overwrite: bool) -> None:
    """Record what the folder's results are of; raises for a folder with others."""
    path = folder / STATE
    for name in (STATE, OVERLAY):
        remove_leftovers_of(folder / name)
    others = [item for item in folder.iterdir() if item.name not in (MASKS, OVERLAY, STATE, LOCK_NAME)]
    if not path.exists() and (others or (folder / MASKS).exists()):
        raise ReclipError(f"--output {folder} has other files: name a new or empty folder")
    if path.exists():
        known = read_json(path, _SCHEMA, "state", _OTHER)
        if known != json.loads(json.dumps(state)) and not overwrite:
            raise ReclipError(f"--output {folder} has masks of another video, model or setting: {_OTHER}")
    if overwrite:
        shutil.rmtree(folder / MASKS, ignore_errors=True)
        (folder / OVERLAY).unlink(missing_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _name(index: int) -> PurePosixPath:
    return PurePosixPath(f"{index:06d}.png")


def _write_masks(
    folder: Path, video: Video, predictor: Any, table: MaskClassTable, window: int
) -> tuple[int, int, np.ndarray]:
    """Write missing masks; number of frames, of new masks, and pixels by id ``(256,)`` int64 of all."""
    masks, made, frames = folder / MASKS, 0, 0
    remove_leftovers(masks)
    pixels = np.zeros(256, np.int64)
    with IndexWriter(masks, table.mask_classes) as index:

        def missing(number: int) -> bool:
            return not index.is_done(_name(number))

        with count_steps("masks", video.expected_frames, unit="frame") as steps:
            for frame, bands in predict_frames(predictor, video.frames(), window, missing):
                frames += 1
                if bands is None:
                    labels = read_index(masks / _name(frame.index), table.mask_classes)
                else:
                    labels = np.empty(frame.pixels.shape[:2], np.uint8)
                    for band in bands:
                        labels[band.rows] = table.ids[band.labels.cpu().numpy()]
                    index.add(Prediction(_name(frame.index), labels))
                    made += 1
                pixels += np.bincount(labels.ravel(), minlength=256)
                if steps.done < video.expected_frames:  # the header may say too few
                    steps.advance()
    if not frames:
        raise ReclipError(f"video {video.path} has no frames: give another file")
    return frames, made, pixels


def _write_overlay(folder: Path, video: Video, table: MaskClassTable) -> None:
    def pictures() -> Iterator[tuple[Fraction, np.ndarray]]:
        for frame in video.frames():
            labels = read_index(folder / MASKS / _name(frame.index), table.mask_classes)
            yield frame.seconds, blend_colors(frame.pixels, labels, table.mask_classes)

    path = folder / OVERLAY
    newest = max(mask.stat().st_mtime_ns for mask in (folder / MASKS).glob("*.png"))
    if path.exists() and path.stat().st_mtime_ns >= newest:
        say("overlay", "done before")
        return
    say("overlay")
    write_video(path, pictures(), video.rate)
