"""The last step of ``segment`` and ``predict``: masks, other formats, the summary and the exit status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tqdm import tqdm

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import peek_size
from reclip_d2.engine.checkpoint import ReclipCheckpointer
from reclip_d2.errors import ReclipError
from reclip_d2.formats import check_formats, check_jpeg_size, check_names, write_formats
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.io import atomic_write
from reclip_d2.workspace.masks import MaskClassTable, predict_masks, read_coverage
from reclip_d2.workspace.names import TITLES
from reclip_d2.workspace.run_folder import RunFolder, begin_results
from reclip_d2.workspace.run_state import MASKS, SUMMARY, RunState


class Request:
    """What the masks shall be.

    Attributes:
        kind: of the model, a key of :data:`~reclip_d2.workspace.names.TITLES`.
        table: from the model's classes to the masks'.
        formats: beside the index masks.
        skip_broken: broken images are no error.
    """

    def __init__(
        self, kind: str, classes: ClassList, *, background: str, formats: Sequence[str], skip_broken: bool
    ) -> None:
        """
        Args:
            background: ``ignore`` or ``keep``.
            formats: names, or several joined by commas.
        """
        self.kind = kind
        self.classes = classes
        self.background = background
        self.table = MaskClassTable(classes, background == "keep")
        names = [name for part in formats for name in part.split(",") if name]
        self.formats = tuple(name for name in dict.fromkeys(names) if name != "index")
        self.skip_broken = skip_broken

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


def load_predictor(cfg: CfgNode, kind: str, weights: Path) -> ImagePredictor:
    """The model of a kind with its checkpoint; ``custom`` must be registered.

    Args:
        weights: of a trained kind.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if kind == "student":  # without its teacher
        cfg.MODEL.META_ARCHITECTURE = "Student"
    model = build_model(cfg).eval()
    if kind != "maskclip":
        ReclipCheckpointer(model).load(str(weights))
    return ImagePredictor.from_config(model, cfg)


def write_results(
    folder: RunFolder,
    state: RunState,
    request: Request,
    images: Sequence[ImageFile],
    problems: dict[str, str],
    cfg: CfgNode,
    weights: Path,
) -> int:
    """Masks that are missing, other formats, and the summary.

    Args:
        images: all, the broken ones too.
        problems: why an image cannot be used, by its id; more may be found.
        cfg, weights: of the model.

    Returns:
        the exit status: 0, or 1 if there were broken images.
    """
    begin_results(folder, state, request.results, [MASKS, SUMMARY, *request.formats])
    usable = [image for image in images if image.image_id not in problems]
    missing = folder.missing_masks(usable, request.results)
    scores = folder.path / "scores" if "scores" in request.formats else None
    if missing or scores:
        print("masks ...", flush=True)
        problems |= predict_masks(
            lambda: load_predictor(cfg, request.kind, weights), usable, request.table, folder.masks, scores
        )
        usable = [image for image in usable if image.image_id not in problems]
    else:
        print("masks: done before")
    if request.formats and usable:
        print(f"formats ({', '.join(request.formats)}) ...", flush=True)
        with tqdm(total=len(usable), desc="formats", unit="image") as bar:
            write_formats(
                folder.masks,
                {image.name: image.path for image in usable},
                folder.path,
                request.formats,
                progress=lambda done, _: bar.update(done - bar.n),
            )
    _summarize(folder, request, images, usable, problems, made=len([i for i in missing if i.image_id not in problems]))
    if problems and not request.skip_broken:
        raise ReclipError(
            f"{len(problems)} of {len(images)} images have no mask (listed above): replace or remove them, or give"
            " --skip-broken"
        )
    return 0


def _summarize(
    folder: RunFolder,
    request: Request,
    images: Sequence[ImageFile],
    usable: Sequence[ImageFile],
    problems: Mapping[str, str],
    made: int,
) -> None:
    """Print the summary, and keep it in ``summary.json``."""
    names = request.table.mask_classes.names
    coverage = read_coverage(folder.masks, usable)
    pixels = sum(sum(counts.values()) for counts in coverage.values())
    rows = []
    for label, name in [*enumerate(names), (255, "ignored")]:
        counts = [counts.get(str(label), 0) for counts in coverage.values()]
        rows.append({"id": label, "name": name, "pixels": sum(counts), "images": sum(count > 0 for count in counts)})
    if not rows[-1]["pixels"]:
        rows.pop()
    content = {
        "model": request.kind,
        "images": len(images),
        "masks": len(coverage),
        "pixels": pixels,
        "classes": rows,
        "problems": dict(problems),
    }
    with atomic_write(folder.summary) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    print(f"\n{len(coverage):,} masks by {TITLES[request.kind]}, {made:,} of them made now")
    width = max(len(row["name"]) for row in rows)
    print(f"  {'class':<{width}}   of all pixels   in images")
    for row in rows:
        print(f"  {row['name']:<{width}}  {100 * row['pixels'] / max(pixels, 1):12.1f} %  {row['images']:10,}")
    unseen = [row["name"] for row in rows if not row["pixels"]]
    if unseen:
        print(f"  never predicted: {', '.join(unseen)}")
    for key, problem in problems.items():
        print(f"  no mask of {key}: {problem}")
    print(f"masks     {folder.masks} (index PNGs; classes.json there says what the ids mean)")
    for name in request.formats:
        print(f"{name:<9} {folder.path / name}")
    print(f"summary   {folder.summary}")
