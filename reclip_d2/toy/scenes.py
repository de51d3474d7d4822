"""Scenes of the embedded world: curved regions, each of one material that is blended with its partner.

*Task scenes* are the pictures of the data set, *compositions* those of the tiny CLIP's pretraining; the world defines
where and how often they show materials. A *close-up* shows one material. Each picture depends only on its seed and
index.

Shape letters: S image side in pixels (96), R regions of a scene, C = 12 materials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from reclip_d2.toy import textures
from reclip_d2.toy.noise import SIZE, pixel_grid, value_noise
from reclip_d2.toy.worlds import EMBEDDED, MATERIALS, NUM_MATERIALS, World, partner

TEXTURES: tuple[Callable[[np.random.Generator], np.ndarray], ...] = tuple(getattr(textures, m.key) for m in MATERIALS)

REGION_COUNTS = (2, 3, 4, 5)
REGION_COUNT_SHARES = (0.25, 0.35, 0.25, 0.15)
CENTRAL_REGION_SHARE = 0.7
"""Share of scenes with a region in the middle, surrounded by the others."""
BLEND_RANGE = (0.15, 0.42)
"""Share of the partner in a region. The ambiguity is the region's, so smoothing cannot resolve it."""
PRETRAINING_BLEND_RANGE = (0.10, 0.65)
"""The same in compositions, with a density that falls to 0 at the upper end: some captions name the lesser material.

The look of a region then says less about its name, and the place and frequency of names say more, so the tiny CLIP
learns to rely on them, like a CLIP trained on captions from the web."""

# Streams separate the random numbers of different kinds of pictures.
TASK_STREAM, COMPOSITION_STREAM, CLOSE_UP_STREAM = 0, 1, 2


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: uint8 RGB (S, S, 3).
        labels: uint8 (S, S), the material of each pixel, 0..C-1; every pixel has one.
        materials: materials of the regions, distinct, int64 (R,).
        blends: share of the partner in each region, float64 (R,).
    """

    image: np.ndarray
    labels: np.ndarray
    materials: np.ndarray
    blends: np.ndarray


def place_preference(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How much each material prefers each place, in [-1, 1].

    Args:
        y, x: positions in the image, 0 (top, left) to 1 (bottom, right), same shape (...).

    Returns:
        float64 (..., C); the two materials of a pair always have opposite signs.
    """
    down = 2 * np.asarray(y) - 1
    # Halfway between the centres of central regions and those of the surrounding ones.
    # Half as strong, since nearly every region is clearly central or not, but few are clearly up or down.
    border = 0.5 * np.clip((np.hypot(np.asarray(y) - 0.5, np.asarray(x) - 0.5) - 0.24) / 0.12, -1, 1)
    likes = {"up": -down, "down": down, "border": border, "centre": -border}
    return np.stack([likes[m.place] for m in MATERIALS], axis=-1)


def _region_weights(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Curved Voronoi cells: centres (R, 2) as (y, x) in 0..1, and soft memberships float32 (R, S, S).

    The memberships of a pixel sum to 1. The coordinates are bent by smooth noise before the nearest centre is
    taken; the membership falls from 1 to 0 within about two pixels of a boundary, which is all the
    anti-aliasing that pictures of this size need.
    """
    y, x = pixel_grid()
    # Best of several draws: distant centres give regions of sufficient size.
    draws = rng.uniform(0.08, 0.92, (8, count, 2))
    if rng.random() < CENTRAL_REGION_SHARE:
        draws[:, 0] = rng.uniform(0.42, 0.58, (8, 2))
    gaps = np.linalg.norm(draws[:, :, None] - draws[:, None], axis=-1) + 9 * np.eye(count)
    centers = draws[gaps.min(axis=(1, 2)).argmax()]
    bent_y = (y + 0.5) / SIZE + 0.07 * value_noise(rng, 2, 2) + 0.022 * value_noise(rng, 6, 6)
    bent_x = (x + 0.5) / SIZE + 0.07 * value_noise(rng, 2, 2) + 0.022 * value_noise(rng, 6, 6)
    spots = centers.astype(np.float32)[:, :, None, None]
    distances = np.hypot(bent_y - spots[:, 0], bent_x - spots[:, 1])
    closeness = np.exp((distances.min(axis=0) - distances) * (SIZE * 1.2))
    return centers, closeness / closeness.sum(axis=0)


def _blended_texture(rng: np.random.Generator, material: int, blend: float) -> np.ndarray:
    """(1 - blend) of a material's texture and ``blend`` of its partner's; float32 (S, S, 3)."""
    own = np.clip(TEXTURES[material](rng), 0, 1)
    other = np.clip(TEXTURES[partner(material)](rng), 0, 1)
    return own + (other - own) * np.float32(blend)


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _compose(
    rng: np.random.Generator,
    chances: Callable[[np.ndarray], np.ndarray],
    draw_blends: Callable[[int], np.ndarray],
) -> Scene:
    """Draw regions and their blends, give each an unused material by the chances (C,) of its centre (2,), render."""
    count = int(rng.choice(REGION_COUNTS, p=REGION_COUNT_SHARES))
    centers, weights = _region_weights(rng, count)
    free = np.ones(NUM_MATERIALS)
    materials = np.zeros(count, dtype=np.int64)
    for region, center in enumerate(centers):
        chance = chances(center) * free
        materials[region] = rng.choice(NUM_MATERIALS, p=chance / chance.sum())
        free[materials[region]] = 0
    blends = draw_blends(count)
    image = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    for weight, material, blend in zip(weights, materials, blends, strict=True):
        image += weight[..., None] * _blended_texture(rng, int(material), blend)
    labels = materials[weights.argmax(axis=0)].astype(np.uint8)
    return Scene(_to_bytes(image), labels, materials, blends)


def render_scene(seed: int, index: int, world: World = EMBEDDED) -> Scene:
    """Task scene number ``index`` of the world with seed ``seed``."""
    rng = np.random.default_rng([seed, TASK_STREAM, index])
    chances = _chances(world.task_weights, world.task_place_strength)
    return _compose(rng, chances, lambda count: rng.uniform(*BLEND_RANGE, count))


def render_composition(seed: int, index: int, world: World = EMBEDDED) -> Scene:
    """Pretraining composition: materials tend to be in their preferred places, and mix more than in the task."""
    rng = np.random.default_rng([seed, COMPOSITION_STREAM, index])
    low, high = PRETRAINING_BLEND_RANGE
    chances = _chances(world.pretraining_weights, world.pretraining_place_strength)
    return _compose(rng, chances, lambda count: high - (high - low) * np.sqrt(rng.random(count)))


def _chances(weights: Sequence[float], place_strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """Relative chances (C,) of the materials for a region, by its centre (2,)."""
    return lambda center: np.array(weights) * np.exp(place_strength * place_preference(center[0], center[1]))


def render_close_up(seed: int, index: int) -> tuple[np.ndarray, int]:
    """Close-up of one material, at a zoom of 1 to 6, and its material; the image is uint8 RGB (S, S, 3).

    The zoom goes up to the 1/6 crops from which image-level hypotheses are made.
    """
    rng = np.random.default_rng([seed, CLOSE_UP_STREAM, index])
    material = int(rng.integers(NUM_MATERIALS))
    texture = _blended_texture(rng, material, rng.uniform(*BLEND_RANGE))
    side = int(round(SIZE / np.exp(rng.uniform(0, np.log(6)))))
    top, left = rng.integers(0, SIZE - side + 1, 2)
    crop = Image.fromarray(_to_bytes(texture[top : top + side, left : left + side]))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)), material
