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
    """What the masks shall be.

    Attributes:
        kind: of the model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        classes: the model's.
        background: ``ignore`` or ``keep``.
        table: from the model's classes to the masks'.
        formats: in addition to the index masks.
    """

    def __init__(self, kind: str, classes: ClassList, background: str, formats: Sequence[str]) -> None:
        """
        Args:
            formats: names, or several joined by commas.
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
    """How much of the masks a class has.

    Attributes:
        id: in the masks; 255 for ignored pixels.
        name: of the class.
        pixels: in all masks.
        images: in how many masks it occurs.
    """

    id: int
    name: str
    pixels: int
    images: int


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run has written.

    Attributes:
        folder: the output folder.
        kind: of the model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        images: all that were named.
        masks: how many of them have a mask.
        made: how many of the masks this run has made; the others were there.
        classes: share of each class, in the order of the ids, the ignored pixels last if there are any.
        problems: why the others have none, by image id.
        formats: further formats that were written.
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
        """Of all masks."""
        return sum(share.pixels for share in self.classes)


def report_transparency(images: Sequence[ImageFile]) -> None:
    """Report how many images are transparent somewhere, and what becomes of that."""
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
    """Masks that are missing, other formats, and ``summary.json``.

    Args:
        images: all, the broken ones too.
        problems: why an image cannot be used, by its id; more may be found.
        cfg, weights: of the model.
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
        usable: images that have a mask.
        missing: images that had none before.
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
