"""The last stage of a run: masks, other formats and the summary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from reclip_d2.data.class_file import IGNORE_LABEL, ClassList
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import describe_alpha, peek_size
from reclip_d2.formats import check_formats, check_jpeg_size, check_names, write_formats
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.progress import count_steps, say
from reclip_d2.workspace.masks import MaskClassTable, predict_masks, read_coverage
from reclip_d2.workspace.run_folder import RunFolder, begin_results
from reclip_d2.workspace.run_state import MASKS, SUMMARY, RunState
from reclip_d2.workspace.trained_model import load_predictor


class MaskRequest:
    """The masks to write.

    Attributes:
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        classes: the model's classes.
        background: ``ignore`` or ``keep``.
        table: mapping from the model's classes to mask ids.
        formats: formats in addition to the index masks.
    """

    def __init__(self, kind: str, classes: ClassList, background: str, formats: Sequence[str]) -> None:
        """
        Args:
            formats: names, which may be joined by commas.
        """
        self.kind = kind
        self.classes = classes
        self.background = background
        self.table = MaskClassTable(classes, background == "keep")
        names = [name for part in formats for name in part.split(",") if name]
        self.formats = tuple(name for name in dict.fromkeys(names) if name != "index")

    @property
    def results(self) -> dict[str, str]:
        """See :attr:`RunState.results`."""
        return {"model": self.kind, "background": self.background}

    def check(self, images: Sequence[ImageFile]) -> None:
        """Raise :class:`ReclipError` for a format, a file name or an image's size that would fail at the end."""
        check_formats(self.formats, self.table.mask_classes)
        check_names(self.formats, [image.name for image in images])
        if "overlay" in self.formats:
            for image in images:
                check_jpeg_size(image.name, peek_size(image.path))


@dataclasses.dataclass(frozen=True)
class ClassShare:
    """A class's share of the masks.

    Attributes:
        id: id in the masks; 255 for ignored pixels.
        name: name of the class.
        pixels: number of pixels in all masks.
        images: number of masks in which it occurs.
    """

    id: int
    name: str
    pixels: int
    images: int


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The results of a run.

    Attributes:
        folder: the output folder.
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        images: number of images.
        masks: number of images with a mask.
        made: number of masks made by this run; the others existed.
        classes: share of each class in the order of the ids; ignored pixels, if any, come last.
        problems: the reason for each image without a mask, by image id.
        formats: other formats that were written.
    """

    folder: RunFolder
    kind: str
    images: int
    masks: int
    made: int
    classes: tuple[ClassShare, ...]
    problems: Mapping[str, str]
    formats: tuple[str, ...]

    @property
    def pixels(self) -> int:
        """Number of pixels in all masks."""
        return sum(share.pixels for share in self.classes)


def report_transparency(images: Sequence[ImageFile]) -> None:
    """Report how many images have transparent regions, and how these are read."""
    if line := describe_alpha(image.path for image in images):
        say("images", line)


def write_results(
    folder: RunFolder,
    state: RunState,
    request: MaskRequest,
    images: Sequence[ImageFile],
    problems: Mapping[str, str],
    cfg: CfgNode,
    weights: Path,
) -> RunResult:
    """Write missing masks, other formats, and ``summary.json``.

    Args:
        images: all images, including broken ones.
        problems: the reason for each image that cannot be used, by image id; more may be found.
        cfg, weights: config and checkpoint of the model.
    """
    begin_results(folder, state, request.results, [MASKS, SUMMARY, *request.formats])
    problems = dict(problems)
    usable = [image for image in images if image.image_id not in problems]
    missing = folder.missing_masks(usable, request.results)
    scores = folder.path / "scores" if "scores" in request.formats else None
    if missing or scores:
        say("masks")
        problems |= predict_masks(
            lambda: load_predictor(cfg, request.kind, request.classes, weights),
            usable,
            request.table,
            folder.masks,
            scores,
        )
        usable = [image for image in usable if image.image_id not in problems]
    else:
        say("masks", "done before")
    if request.formats and usable:
        say("formats", ", ".join(request.formats))
        with count_steps("formats", len(usable)) as steps:
            write_formats(
                folder.masks,
                {image.name: image.path for image in usable},
                folder.path,
                request.formats,
                progress=lambda done, _: steps.advance(done - steps.done),
            )
    result = _summarize(folder, request, images, usable, problems, missing)
    _write_summary(result)
    return result


def _summarize(
    folder: RunFolder,
    request: MaskRequest,
    images: Sequence[ImageFile],
    usable: Sequence[ImageFile],
    problems: Mapping[str, str],
    missing: Sequence[ImageFile],
) -> RunResult:
    """Count the pixels of each class.

    Args:
        usable: images with a mask.
        missing: images that had no mask before.
    """
    coverage = read_coverage(folder.masks, usable)
    shares = []
    for label, name in [*enumerate(request.table.mask_classes.names), (IGNORE_LABEL, "ignored")]:
        counts = [counts.get(str(label), 0) for counts in coverage.values()]
        shares.append(ClassShare(label, name, sum(counts), sum(count > 0 for count in counts)))
    if not shares[-1].pixels:
        shares.pop()
    return RunResult(
        folder=folder,
        kind=request.kind,
        images=len(images),
        masks=len(coverage),
        made=sum(image.image_id not in problems for image in missing),
        classes=tuple(shares),
        problems=problems,
        formats=request.formats,
    )


def _write_summary(result: RunResult) -> None:
    content = {
        "model": result.kind,
        "images": result.images,
        "masks": result.masks,
        "pixels": result.pixels,
        "classes": [dataclasses.asdict(share) for share in result.classes],
        "problems": dict(result.problems),
    }
    with atomic_write(result.folder.summary) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
