"""Example images for the tiny CLIP that ships with the package: scenes of its world."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from reclip_d2.toy.scenes import render_scene
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_CLASSES
from reclip_d2.utils.io import atomic_write

EXAMPLE_CLASSES = "\n".join(EMBEDDED_CLASSES)
# Scenes that no split of the embedded data set has.
_FIRST_INDEX = 400_000


def write_example_scenes(folder: Path, count: int) -> list[Path]:
    """Write scenes as JPEGs; the same each time."""
    paths = [folder / f"scene {number + 1:02d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        with atomic_write(path) as temporary:
            Image.fromarray(render_scene(EMBEDDED.dataset_seed, _FIRST_INDEX + number).image).save(
                temporary, "JPEG", quality=95
            )
    return paths
