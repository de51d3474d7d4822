"""Generated inputs of the benchmark: photographs, class lists, and the weights of a random CLIP.

The arithmetic of a CLIP with random weights is that of the real one; only times and memory mean something here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.backbones.build import build_clip
from reclip_d2.data.class_file import ClassList
from reclip_d2.data.classes import class_names_of
from reclip_d2.utils.io import atomic_write

CLIP_NAME = "ViT-B-16-quickgelu"
_ADJECTIVES = (
    "red green blue white black old new large small wooden round flat dark bright wet dry tall short open closed"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all measurements share.

    Attributes:
        device: device of the networks.
        folder: working folder: weights, photographs, runs.
        quick: the tiny CLIP and small images, to test the program in seconds.
        repeats: repetitions of the steps that take turns.
    """

    device: torch.device
    folder: Path
    quick: bool = False
    repeats: int = 3

    @property
    def clip_keys(self) -> list[str]:
        """Config overrides of all steps: CLIP, precision of its tower, and one template, since texts are not timed."""
        keys = ["MODEL.DEVICE", self.device.type, "MODEL.CLIP.TEMPLATES", "photo"]
        if not self.quick:
            keys += ["MODEL.CLIP.NAME", CLIP_NAME, "MODEL.CLIP.PRETRAINED", "random"]
        return keys

    @property
    def clip_options(self) -> dict[str, str]:
        """The CLIP in options of ``reclip segment``; writes its weights if they are missing."""
        if self.quick:
            return {"clip": EMBEDDED_MODEL_NAME}
        return {"clip": CLIP_NAME, "pretrained": str(random_weights(self.folder))}


def random_weights(folder: Path) -> Path:
    """The weights of a ViT-B/16 from seed 0, as a file of ``folder``."""
    path = folder / f"{CLIP_NAME}-random.pt"
    if not path.exists():
        with atomic_write(path) as temporary:
            torch.save(build_clip(CLIP_NAME, "random")[0].state_dict(), temporary)
    return path


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """A picture with details of all sizes, like a photograph: noise of several scales, added."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 90.0), (16, 45.0), (64, 20.0), (256, 8.0)):
        if cells > 4 * max(height, width):
            continue
        noise = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += weight / 128 * (np.asarray(layer, np.float32) - 128)
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """Photographs as JPEGs of quality 90, numbered; those that exist are kept."""
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            with atomic_write(path) as temporary:
                photograph(number, height, width).save(temporary, "JPEG", quality=90)
    return paths


def classes_of(dataset: str) -> ClassList:
    """The class list of a registered data set."""
    return ClassList(tuple(tuple(names) for names in class_names_of(dataset)))


def generated_classes(count: int) -> ClassList:
    """``count`` different class names of one or two words: ADE20K's, then the same with adjectives."""
    nouns = [names[0] for names in class_names_of("ade150_train")]
    names = [*nouns, *(f"{adjective} {noun}" for adjective in _ADJECTIVES.split() for noun in nouns)]
    return ClassList(tuple((name,) for name in names[:count]))
