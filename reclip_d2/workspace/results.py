"""The last stage of a run: masks, other formats and the summary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

from reclip_d2.data.class_file import IGNORE_LABEL, ClassList
from reclip_d2.data.geotiff import SceneReading, load_rasterio
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import describe_alpha, peek_size
from reclip_d2.errors import ReclipError
from reclip_d2.formats import check_formats, check_jpeg_size, check_names, write_formats
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.progress import count_steps, say
from reclip_d2.workspace.decision import Decision
from reclip_d2.workspace.masks import MaskClassTable, read_coverage
from reclip_d2.workspace.run_folder import RunFolder, begin_results
from reclip_d2.workspace.run_result import ClassShare, RunResult
from reclip_d2.workspace.run_state import MASKS, PAGE, SUMMARY, RunState
from reclip_d2.workspace.scenes import predict_images
from reclip_d2.workspace.stored_images import StoredImages
from reclip_d2.workspace.summary_page import summary_page


class MaskRequest:
    """The masks to write.

    Attributes:
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        classes: the model's classes.
        background: ``ignore`` or ``keep``.
        table: mapping from the model's classes to mask ids.
        formats: formats in addition to the index masks.
        reading: how GeoTIFFs become RGB.
    """

    def __init__(
        self,
        kind: str,
        classes: ClassList,
        background: str,
        formats: Sequence[str],
        reading: SceneReading = SceneReading(),  # noqa: B008 (immutable)
    ) -> None:
        """
        Args:
            formats: names, which may be joined by commas.
        """
        self.reading = reading
        self.kind = kind
        self.classes = classes
        self.background = background
        self.table = MaskClassTable(classes, background == "keep")
        names = [name for part in formats for name in part.split(",") if name]
        self.formats = tuple(name for name in dict.fromkeys(names) if name != "index")

    def of(self, kind: str, *, formats: bool = True) -> MaskRequest:
        """The same masks by another kind of model.

        Args:
            formats: also in the other formats.
        """
        return MaskRequest(kind, self.classes, self.background, self.formats if formats else (), self.reading)

    @property
    def needs_images(self) -> bool:
        """Whether a format shows the images or refers to them."""
        return not {"palette", "scores"}.issuperset(self.formats)

    @property
    def results(self) -> dict[str, str]:
        """See :attr:`RunState.results`."""
        return {"model": self.kind, "background": self.background}

    def check(self, images: Sequence[ImageFile], mine: Sequence[ImageFile] | None = None) -> None:
        """Raise :class:`ReclipError` for a format, a file name or an image's size that would fail at the end.

        Args:
            mine: the images that this process opens; None for all.
        """
        if scene := next((image for image in images if image.is_scene), None):
            load_rasterio()
            if self.formats:
                raise ReclipError(
                    f"--formats {' '.join(self.formats)}: {scene.name} is a GeoTIFF, whose mask is a GeoTIFF alone;"
                    " give GeoTIFFs in a command without --formats, or INPUT.GEO.ENABLED False to read them as pictures"
                )
        check_formats(self.formats, self.table.mask_classes)
        check_names(self.formats, [image.name for image in images])
        if "overlay" in self.formats:
            for image in images if mine is None else mine:
                if not image.url:  # an image at a URL is checked when its overlay is written
                    check_jpeg_size(image.name, peek_size(image.path))


def report_transparency(images: Sequence[ImageFile]) -> None:
    """Report how many images have transparent regions, and how these are read."""
    paths = (image.available for image in images if not image.is_scene)
    if line := describe_alpha(path for path in paths if path):
        say("images", line)


Load = Callable[[str], tuple[ImagePredictor, StoredImages | None]]
"""Loads the predictor of a kind of model and, if there are any, features of the images."""


MakeMasks = Callable[[MaskRequest, Sequence[ImageFile], str], dict[str, str]]
"""Writes missing masks of images elsewhere than in this process, with a name of the stage; returns the reason for each
image that could not be predicted, by image id."""


def write_candidate(
    folder: RunFolder,
    state: RunState,
    request: MaskRequest,
    images: Sequence[ImageFile],
    load: Load,
    stage: str,
    make: MakeMasks | None = None,
) -> dict[str, str]:
    """Write the missing masks of a kind of model that may not be the one that is kept.

    Args:
        images: usable images.
        stage: name in progress events.
        make: makes the masks elsewhere; None to make them in this process.

    Returns:
        The reason for each image that could not be predicted, by image id.
    """
    if not folder.lacking_masks(images, request.results):
        return {}
    begin_results(folder, state, request.results, [MASKS], silent=True)
    problems: dict[str, str] = {}
    if make is not None:
        problems = make(request, images, stage)
        images = [image for image in images if image.is_scene]
    return problems | predict_images(
        lambda: load(request.kind), images, request.reading, request.table, folder.masks, stage=stage
    )


def write_results(
    folder: RunFolder,
    state: RunState,
    request: MaskRequest,
    images: Sequence[ImageFile],
    problems: Mapping[str, str],
    load: Load,
    decision: Decision | None = None,
    new: Sequence[str] = (),
    make: MakeMasks | None = None,
) -> RunResult:
    """Write missing masks, other formats, and the summary.

    Args:
        images: all images, including broken ones.
        problems: the reason for each image that cannot be used, by image id; more may be found.
        load: see :data:`Load`.
        decision: whose masks are kept, and why; None without training.
        new: ids of images whose masks this run has already made.
        make: see :func:`write_candidate`.
    """
    begin_results(folder, state, request.results, [MASKS, SUMMARY, PAGE, *request.formats], silent=decision is not None)
    problems = dict(problems)
    usable = [image for image in images if image.image_id not in problems]
    missing = folder.missing_masks(usable, request.results)
    scores = folder.path / "scores" if "scores" in request.formats else None
    if missing or scores:
        say("masks")
        if make is not None:
            problems |= make(request, usable, "masks")
            usable = [image for image in usable if image.image_id not in problems]
        problems |= predict_images(
            lambda: load(request.kind), usable, request.reading, request.table, folder.masks, scores
        )
        usable = [image for image in usable if image.image_id not in problems]
    elif not new:
        say("masks", "done before")
    if request.formats and usable:
        say("formats", ", ".join(request.formats))
        with count_steps("formats", len(usable)) as steps:
            write_formats(
                folder.masks,
                {image.name: image.available for image in usable},
                folder.path,
                request.formats,
                progress=lambda done, _: steps.advance(done - steps.done),
            )
    made = {image.image_id for image in missing} | set(new)
    result = summarize(folder, request, images, usable, problems, made, decision)
    _write_summary(result)
    _write_page(result, request, usable)
    return result


def summarize(
    folder: RunFolder,
    request: MaskRequest,
    images: Sequence[ImageFile],
    usable: Sequence[ImageFile],
    problems: Mapping[str, str],
    new: set[str],
    decision: Decision | None,
    lacking: int = 0,
) -> RunResult:
    """Count the pixels of each class.

    Args:
        images: all images.
        usable: images with a mask.
        problems: the reason for each image without a mask, by image id.
        new: ids of images that had no mask before.
        lacking: see :attr:`RunResult.lacking`.
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
        made=len(new - set(problems)),
        classes=tuple(shares),
        problems=problems,
        formats=request.formats,
        decision=decision,
        lacking=lacking,
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
    if result.decision is not None:
        decision = result.decision
        content["kept"] = {
            "kind": decision.kept,
            "asked": decision.asked,
            "reason": decision.reason,
            "warning": decision.warning,
            "scores": dict(decision.scores),
        }
        content["shares"] = {kind: list(result.shares(kind).values()) for kind in decision.pixels}
    with atomic_write(result.folder.summary) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_page(result: RunResult, request: MaskRequest, images: Sequence[ImageFile]) -> None:
    kinds = [request.kind]
    if result.decision is not None:
        kinds += [kind for kind in result.decision.pixels if kind != request.kind]
    folders = {kind: result.folder.masks_of(request.of(kind).results) for kind in kinds}
    page = summary_page(result, images, request.table.mask_classes, folders, request.reading)
    with atomic_write(result.folder.page) as temporary:
        temporary.write_text(page, encoding="utf-8")
