"""Predict the masks of GeoTIFFs, window by window, skipping those that exist."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reclip_d2.data.geotiff import SceneReading
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.scene_files import open_scene_file
from reclip_d2.errors import ReclipError
from reclip_d2.formats.geotiff import IGNORE, GeoMaskWriter
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.files import open_to_append
from reclip_d2.utils.io import naming_errors
from reclip_d2.utils.progress import count_steps, say
from reclip_d2.utils.work_shard import WorkShard
from reclip_d2.workspace.masks import MaskClassTable, coverage_name, predict_masks
from reclip_d2.workspace.stored_images import StoredImages


def predict_images(
    load: Callable[[], tuple[ImagePredictor, StoredImages | None]],
    images: Sequence[ImageFile],
    reading: SceneReading,
    table: MaskClassTable,
    folder: Path,
    scores_folder: Path | None = None,
    shard: WorkShard | None = None,
    stage: str = "masks",
) -> dict[str, str]:
    """:func:`~reclip_d2.workspace.masks.predict_masks` of the pictures, and :func:`predict_scenes` of the GeoTIFFs."""
    pictures = [image for image in images if not image.is_scene]
    scenes = [image for image in images if image.is_scene]
    problems = predict_masks(load, pictures, table, folder, scores_folder, stage, shard)
    return problems | predict_scenes(lambda: load()[0], scenes, reading, table, folder, shard, stage)


def predict_scenes(
    load: Callable[[], ImagePredictor],
    scenes: Sequence[ImageFile],
    reading: SceneReading,
    table: MaskClassTable,
    folder: Path,
    shard: WorkShard | None = None,
    stage: str = "masks",
) -> dict[str, str]:
    """Write the masks of GeoTIFFs missing in ``folder``.

    Memory grows with a scene's width alone: a row of tiles, a band of logits (``TEST.BAND_MEMORY``), a row of blocks of
    the mask, and GDAL's cache.

    Args:
        load: loads the predictor; called if a mask is missing.
        reading: how scenes become RGB.
        shard, stage: as for :func:`~reclip_d2.workspace.masks.predict_masks`.

    Returns:
        The reason for each scene that could not be predicted, by image id.
    """
    todo = [image for image in scenes if not (folder / image.mask_name).exists()]
    problems: dict[str, str] = {}
    if not todo:
        return problems
    predictor = load()
    coverage_file = folder / coverage_name(shard)
    with open_to_append(coverage_file) as coverage:
        for image in todo:
            try:
                pixels = _predict(predictor, image, reading, table, folder, stage)
            except ReclipError as error:
                problems[image.image_id] = str(error)
                continue
            with naming_errors(coverage_file):
                coverage.write("\n" + json.dumps({"image_id": image.image_id, "pixels": pixels}))
                coverage.flush()
    return problems


def _predict(
    predictor: ImagePredictor, image: ImageFile, reading: SceneReading, table: MaskClassTable, folder: Path, stage: str
) -> dict[str, int]:
    """Write one mask; pixels of each id."""
    with open_scene_file(image, reading) as scene:
        height, width, _ = scene.shape
        say(stage, f"{image.name}: {scene}")
        with GeoMaskWriter(folder / image.mask_name, scene, table.mask_classes) as writer:
            with count_steps(str(image.name), height, unit="row") as steps:
                for band in predictor.scene_bands(scene):
                    labels = table.ids[band.labels.cpu().numpy()]
                    valid = scene.valid(band.rows, slice(0, width))
                    if valid is not None:
                        labels[~valid] = IGNORE
                    writer.add(labels)
                    steps.advance(len(labels))
        pixels = writer.pixels
    return {str(label): int(pixels[label]) for label in np.flatnonzero(pixels)}
