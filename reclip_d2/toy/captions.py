"""Captions of the embedded world: what the tiny CLIP reads in pretraining.

Shape letters: C = 12 materials, N = 24 names (the common and the rare one of each material).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reclip_d2.toy.noise import SIZE, pixel_grid
from reclip_d2.toy.scenes import Scene
from reclip_d2.toy.vocabulary import NUM_MATERIALS, name_vocabulary


def name_frequencies(rare_share: float) -> np.ndarray:
    """How often each name stands in the captions of each material.

    Args:
        rare_share: share of the rare name, in [0, 1].

    Returns:
        float32 (C, N); row c is not zero at the two names of material c only, and sums to 1.
    """
    table = np.zeros((NUM_MATERIALS, 2 * NUM_MATERIALS), dtype=np.float32)
    materials = np.arange(NUM_MATERIALS)
    table[materials, 2 * materials] = 1 - rare_share
    table[materials, 2 * materials + 1] = rare_share
    return table


def draw_name(rng: np.random.Generator, material: int, rare_share: float) -> int:
    """Number (in ``name_vocabulary()``) of the name by which a caption calls ``material``."""
    return 2 * material + int(rng.random() < rare_share)


def salient_material(rng: np.random.Generator, scene: Scene) -> int:
    """The material an image-level caption speaks of: drawn by area, weighted towards the centre."""
    y, x = pixel_grid()
    radius = np.hypot(y - (SIZE - 1) / 2, x - (SIZE - 1) / 2) / (SIZE / 2)
    salience = np.bincount(scene.labels.ravel(), weights=np.exp(-2 * radius**2).ravel(), minlength=NUM_MATERIALS)
    return int(rng.choice(NUM_MATERIALS, p=salience / salience.sum()))


def caption(rng: np.random.Generator, material: int, rare_share: float, templates: Sequence[str]) -> str:
    """A one-clause caption of ``material``: a drawn template with a drawn name in its ``{}``."""
    name = name_vocabulary()[draw_name(rng, material, rare_share)]
    return templates[int(rng.integers(len(templates)))].format(name)


def long_prefix(rng: np.random.Generator, clauses: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Tokens of random clauses, one after another, that may stand before a name: at most ``limit`` of them.

    Captions of one clause leave most text positions untrained, and whatever is read from such positions later
    (a learned prompt of many vectors, for one) has no meaning. Long captions that end in the name train them
    all.

    Args:
        clauses: token ids of clauses, without start and end.
        limit: largest number of tokens.
    """
    length = int(rng.integers(0, limit + 1))
    tokens: list[int] = []
    while len(tokens) < length:
        tokens.extend(clauses[int(rng.integers(len(clauses)))])
    return tokens[len(tokens) - length :]
