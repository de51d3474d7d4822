"""The embedded worlds: 12 materials in six confusable pairs, and how often and where each world shows them.

Two biases are built into the *pretraining* of the tiny CLIP:

- class preference through language: the task names half of the classes by a word that is rare in pretraining
  captions (``RARE_NAME_SHARE``), so the tiny CLIP underrates exactly those classes;
- space preference: pretraining compositions put materials in their preferred places (``PLACES``); in the world
  ``EMBEDDED`` the task's scenes put them anywhere.

In its task, one class of each pair is twice as frequent as the other, in three pairs the one with the rare name:
as in real data, a calibration that assumes equally frequent classes is wrong.

Shape letters: C = 12 materials.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# The two materials of a pair prefer opposite places, so the place of a region tells the tiny CLIP which of the two
# it "should" be.
PLACES = ("up", "down", "border", "centre")


@dataclass(frozen=True)
class Material:
    """One material of the world.

    Attributes:
        key: the material, independent of its names; also the name of its texture function.
        common_name: its usual name in pretraining captions.
        rare_name: its rare name in pretraining captions.
        task_name: the name the task's class list uses, one of the two above.
        place: preferred place in pretraining compositions, one of ``PLACES``.
        task_weight: relative probability of being drawn for a region of a task scene.
        color: RGB colour for drawing label maps, each 0-255.
    """

    key: str
    common_name: str
    rare_name: str
    task_name: str
    place: str
    task_weight: float
    color: tuple[int, int, int]


# Pairs are neighbours: material i is blended with its partner i ^ 1.
MATERIALS: tuple[Material, ...] = (
    Material("sky", "sky", "heaven", "sky", "up", 1.0, (120, 190, 255)),
    Material("water", "water", "lake", "lake", "down", 0.5, (20, 70, 200)),
    Material("leaves", "leaves", "foliage", "leaves", "up", 0.5, (0, 110, 50)),
    Material("grass", "grass", "lawn", "lawn", "down", 1.0, (140, 220, 60)),
    Material("snow", "snow", "ice", "snow", "up", 0.5, (240, 245, 255)),
    Material("sand", "sand", "desert", "desert", "down", 1.0, (230, 200, 120)),
    Material("brick", "brick", "wall", "wall", "border", 1.0, (160, 50, 40)),
    Material("wood", "wood", "timber", "wood", "centre", 0.5, (120, 80, 30)),
    Material("stone", "stone", "rock", "rock", "border", 0.5, (150, 150, 160)),
    Material("road", "road", "street", "road", "centre", 1.0, (60, 60, 75)),
    Material("flowers", "flowers", "plants", "plants", "border", 0.5, (240, 90, 190)),
    Material("fire", "fire", "flames", "fire", "centre", 1.0, (255, 130, 0)),
)

NUM_MATERIALS = len(MATERIALS)
EMBEDDED_CLASSES: tuple[str, ...] = tuple(m.task_name for m in MATERIALS)
EMBEDDED_COLORS: tuple[tuple[int, int, int], ...] = tuple(m.color for m in MATERIALS)

# Share of the rare name among the captions of a class, in the last stage of pretraining.
RARE_NAME_SHARE = 0.05


def partner(material: int) -> int:
    """Index of the material that ``material`` is confused (blended) with."""
    return material ^ 1


def name_vocabulary() -> tuple[str, ...]:
    """All names, the common and the rare one of each material in turn: name j belongs to material j // 2."""
    return tuple(name for m in MATERIALS for name in (m.common_name, m.rare_name))


@dataclass(frozen=True)
class World:
    """How often and where materials occur, in the task's scenes and in the pictures of pretraining.

    Attributes:
        name: name of the data set.
        dataset_seed: seed of the data set's scenes.
        split_counts: number of scenes of each split.
        task_weights: relative chance of each material to be drawn for a region of a task scene, (C,).
        pretraining_weights: the same for compositions, (C,).
        task_place_strength: log-odds per unit of ``place_preference`` in task scenes; 0 puts materials anywhere.
        pretraining_place_strength: the same in compositions.
    """

    name: str
    dataset_seed: int
    split_counts: dict[str, int]
    task_weights: tuple[float, ...]
    pretraining_weights: tuple[float, ...] = field(default=(1.0,) * len(MATERIALS))
    task_place_strength: float = 0.0
    pretraining_place_strength: float = 4.0


# Ranks of the long tail. Usual and rare names, and the two materials of a pair, are spread over head and tail.
LONGTAIL_ORDER = (
    "sky", "grass", "road", "brick", "leaves", "water", "wood", "stone", "sand", "snow", "flowers", "fire",
)  # fmt: skip
LONGTAIL_EXPONENT = 2.0
"""Weights fall with the rank to this power: the first material has about 31 % of all pixels, the last 0.9 %."""


def _longtail_weights() -> tuple[float, ...]:
    ranks = np.array([1 + LONGTAIL_ORDER.index(m.key) for m in MATERIALS], dtype=np.float64)
    return tuple((ranks**-LONGTAIL_EXPONENT).tolist())


EMBEDDED = World(
    name="embedded",
    dataset_seed=2024,
    split_counts={"train": 400, "dev": 150, "val": 300},
    task_weights=tuple(m.task_weight for m in MATERIALS),
)
"""Class shares within a factor of two, and no preferred places in the task: frequencies and places that the CLIP has
learned are pure biases here."""

EMBEDDED_LONGTAIL = World(
    name="embedded_longtail",
    dataset_seed=2025,
    # More scenes for evaluation: the rarest material is in one of fifty.
    split_counts={"train": 400, "dev": 300, "val": 600},
    task_weights=_longtail_weights(),
    pretraining_weights=_longtail_weights(),
    task_place_strength=4.0,
)
"""Class shares of a power law and natural places, in the task as in pretraining: what the CLIP has learned about them
is knowledge, and only its preference for common names is a bias."""

WORLDS: dict[str, World] = {world.name: world for world in (EMBEDDED, EMBEDDED_LONGTAIL)}
