"""The summary of a run as a page, ``summary.html``: class shares, whose masks were kept and why, and some masks.

Shape letters: (H, W) size of an image in pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reclip_d2.data.geotiff import SceneReading, open_scene
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import peek_pixels, read_image
from reclip_d2.errors import ReclipError
from reclip_d2.formats import MaskClasses, read_index
from reclip_d2.formats.geotiff import read_part
from reclip_d2.formats.pictures import blend_colors
from reclip_d2.utils.templates import render
from reclip_d2.visualization.reduced import reduce_image, reduce_labels
from reclip_d2.workspace.options import TITLES
from reclip_d2.workspace.run_result import RunResult

PICTURES = 12
"""Maximum number of images on the page, spread evenly over the run's."""
_SIDE = 400
_LARGE = 50_000_000  # images with more pixels are left out, since decoding them takes long
_SCENE_SIDE = 2048  # of GeoTIFFs, this much of the middle is shown


def summary_page(
    result: RunResult,
    images: Sequence[ImageFile],
    classes: MaskClasses,
    folders: Mapping[str, Path],
    reading: SceneReading = SceneReading(),  # noqa: B008 (immutable)
) -> str:
    """The page.

    Args:
        result: results of the run.
        images: images with a mask.
        classes: classes of the masks.
        folders: folders with masks of each kind of model that is compared, the kept one's first.
        reading: how GeoTIFFs become RGB.
    """
    decision = result.decision
    shares = {kind: result.kept_shares() if kind == result.kind else result.shares(kind) for kind in folders}
    colors = {**dict(enumerate(classes.colors)), **{share.id: None for share in result.classes[len(classes.names) :]}}
    rows = [
        {
            "name": share.name,
            "color": "transparent" if colors[share.id] is None else "rgb({}, {}, {})".format(*colors[share.id]),
            "shares": [of_kind[share.id] for of_kind in shares.values()],
            "images": share.images,
        }
        for share in result.classes
    ]
    headings = [TITLES[kind] + (" (kept)" if len(folders) > 1 and kind == result.kind else "") for kind in folders]
    return render(
        "reclip_d2.workspace",
        "summary.html.jinja",
        title=f"{result.masks:,} masks by {TITLES[result.kind]}",
        sentence="" if decision is None else _capital(decision.reason),
        warning="" if decision is None else decision.warning,
        headings=headings,
        rows=rows,
        widest=max([share for of_kind in shares.values() for share in of_kind.values()], default=0) or 1,
        pictures=_pictures(images, classes, list(folders.values()), reading),
        masks=result.masks,
        problems=list(result.problems.items()),
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _pictures(
    images: Sequence[ImageFile], classes: MaskClasses, folders: Sequence[Path], reading: SceneReading
) -> list[dict]:
    """Some images, each with its masks from ``folders``: names and JPEGs in base64."""
    small = [image for image in images if image.available and (image.is_scene or peek_pixels(image.path) <= _LARGE)]
    chosen = [small[number * len(small) // PICTURES] for number in range(PICTURES)] if len(small) > PICTURES else small
    pictures = []
    for image in chosen:
        try:
            pixels, masks = (_scene_and_masks if image.is_scene else _image_and_masks)(image, folders, reading)
        except ReclipError:  # reported elsewhere, and the page can do without it
            continue
        if pixels is None:
            continue
        reduced = reduce_image(pixels, _SIDE)
        data = [_jpeg(reduced), *(_jpeg(_overlay(reduced, labels, classes)) for labels in masks)]
        pictures.append({"name": str(image.name), "data": data})
    return pictures


# A kind that is only compared may lack images that were added later.
def _image_and_masks(
    image: ImageFile, folders: Sequence[Path], _: SceneReading
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    files = [(folder, folder / image.mask_name) for folder in folders]
    masks = [read_index(file, MaskClasses.read(folder)) if file.exists() else None for folder, file in files]
    return read_image(image.path), masks


def _scene_and_masks(
    image: ImageFile, folders: Sequence[Path], reading: SceneReading
) -> tuple[np.ndarray | None, list[np.ndarray | None]]:
    """The middle of a GeoTIFF, None without data, and of its masks."""
    with open_scene(image.path, reading) as scene:
        rows, columns = (
            slice((side - size) // 2, (side + size) // 2)
            for side, size in ((side, min(side, _SCENE_SIDE)) for side in scene.shape[:2])
        )
        pixels = scene.window(rows, columns)
    files = [folder / image.mask_name for folder in folders]
    return pixels, [read_part(file, rows, columns) if file.exists() else None for file in files]


def _overlay(image: np.ndarray, labels: np.ndarray | None, classes: MaskClasses) -> np.ndarray:
    if labels is None:
        return np.full_like(image, 255)
    return blend_colors(image, reduce_labels(labels, _SIDE), classes, 0.6)


def _jpeg(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
