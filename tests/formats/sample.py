"""A few predictions that exercise every format, and their expected label maps.

Run as a program it writes all formats of the sample into a folder, for ``read_with_libraries.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from reclip_d2.formats import FORMATS, IndexWriter, MaskClasses, Prediction, ScoresWriter, write_formats

# Spaces, a slash, letters of three scripts, and all that XML, JSON and YAML must escape.
NAMES = ["tall tree", "sky/água 雲", "a <b> & \"c\" 'd', - #e", "background"]
COLORS = [(0, 128, 0), (10, 20, 230), (0, 128, 0), (255, 255, 0)]  # two are equal
CLASSES = MaskClasses(tuple(NAMES), tuple(COLORS), background=3)
IGNORE = 255


def parts() -> np.ndarray:
    """Class 0 with two holes (class 1, ignored); class 2 in two parts that touch at a corner; background."""
    labels = np.full((12, 17), 3, dtype=np.uint8)
    labels[1:9, 1:11] = 0
    labels[3:5, 2:5] = 1
    labels[4:8, 6:9] = IGNORE
    labels[9:11, 11:14] = 2
    labels[11, 14:17] = 2
    return labels


def sample_labels() -> dict[PurePosixPath, np.ndarray]:
    """Label maps by image path, not sorted."""
    rng = np.random.default_rng(0)
    return {
        PurePosixPath("two.png"): np.full((10, 11), 1, dtype=np.uint8),
        PurePosixPath("a b/one.jpg"): parts(),
        PurePosixPath("deep/er/three.1.webp"): np.full((11, 13), IGNORE, dtype=np.uint8),
        PurePosixPath("vier é\u202f雲.jpg"): rng.choice([0, 1, 2, 3, IGNORE], (14, 10)).astype(np.uint8),
    }


def write_images(folder: Path, labels: dict[PurePosixPath, np.ndarray]) -> dict[PurePosixPath, Path]:
    """Image files of the label maps' sizes, of random pixels."""
    rng = np.random.default_rng(1)
    images = {}
    for path, label in labels.items():
        images[path] = folder / path
        images[path].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*label.shape, 3), dtype=np.uint8)).save(images[path])
    return images


def write_index(
    folder: Path, labels: dict[PurePosixPath, np.ndarray], classes: MaskClasses = CLASSES, scores: bool = False
) -> Path:
    """Index masks in ``folder/index`` and, if wanted, scores in ``folder/scores``."""
    with IndexWriter(folder / "index", classes) as index:
        for path, label in labels.items():
            index.add(Prediction(path, label))
    if scores:
        with ScoresWriter(folder / "scores", classes) as writer:
            for path, label in labels.items():
                shape = (len(classes.names), *label.shape)
                writer.add(Prediction(path, label, scores=np.zeros(shape, dtype=np.float16)))
    return folder / "index"


def write_sample(folder: Path, formats: list[str] | None = None) -> dict[PurePosixPath, np.ndarray]:
    """Images in ``folder/photos`` and formats in ``folder/<format>``; returns the label maps."""
    labels = sample_labels()
    images = write_images(folder / "photos", labels)
    index = write_index(folder, labels, scores=formats is None or "scores" in formats)
    write_formats(index, images, folder, formats or FORMATS)
    return labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_sample(parser.parse_args().folder)
