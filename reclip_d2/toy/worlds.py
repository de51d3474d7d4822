"""The embedded worlds: the same materials, with other class shares and places.

Shape letters: C = 12 materials.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from reclip_d2.toy.vocabulary import MATERIALS


@dataclass(frozen=True)
class World:
    """How often and where materials occur, in the task's scenes and in the pictures of pretraining.

    Attributes:
        name: of the data set.
        dataset_seed: of the data set's scenes.
        split_counts: scenes of each split.
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
"""Weights fall with the rank to this power: about 31 % of all pixels are of the first material, 0.9 % of the last."""


def _longtail_weights() -> tuple[float, ...]:
    ranks = np.array([1 + LONGTAIL_ORDER.index(m.key) for m in MATERIALS], dtype=np.float64)
    return tuple((ranks**-LONGTAIL_EXPONENT).tolist())


EMBEDDED = World(
    name="embedded",
    dataset_seed=2024,
    split_counts={"train": 400, "dev": 150, "val": 300},
    task_weights=tuple(m.task_weight for m in MATERIALS),
)
"""Class shares within a factor of two, and no places in the task: frequencies and places that the CLIP has learnt are
biases here, and nothing else."""

EMBEDDED_LONGTAIL = World(
    name="embedded_longtail",
    dataset_seed=2025,
    # More scenes to measure on: the rarest material is in one of fifty.
    split_counts={"train": 400, "dev": 300, "val": 600},
    task_weights=_longtail_weights(),
    pretraining_weights=_longtail_weights(),
    task_place_strength=4.0,
)
"""Class shares of a power law and natural places, in the task as in pretraining: what the CLIP has learnt of them is
knowledge, and only its preference for usual names is a bias."""

WORLDS: dict[str, World] = {world.name: world for world in (EMBEDDED, EMBEDDED_LONGTAIL)}
