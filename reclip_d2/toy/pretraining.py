"""Pretraining data of the tiny CLIP: batches of pictures, caption tokens and labelled boxes.

Shape letters: B images, h x w patches, n = h*w, C = 12 materials, N = 24 names, T = 77 tokens of a text,
K kept tokens, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reclip_d2.toy.noise import SIZE, pixel_grid
from reclip_d2.toy.scenes import Scene, render_close_up, render_composition
from reclip_d2.toy.worlds import NUM_MATERIALS, World, name_vocabulary

BOXES_PER_IMAGE, BOX_PURITY = 3, 0.7
# Number of draws of the material that a caption mentions, made when a picture is rendered; a batch uses one draw.
SALIENCE_DRAWS = 8
# Pictures per rendering job; fixed, so that pictures do not depend on the number of processes.
JOB_SIZE = 250


def name_frequencies(rare_share: float) -> np.ndarray:
    """How often the captions of each material use each name.

    Args:
        rare_share: share of the rare name, in [0, 1].

    Returns:
        float32 (C, N); row c is non-zero only at the two names of material c, and sums to 1.
    """
    table = np.zeros((NUM_MATERIALS, 2 * NUM_MATERIALS), dtype=np.float32)
    materials = np.arange(NUM_MATERIALS)
    table[materials, 2 * materials] = 1 - rare_share
    table[materials, 2 * materials + 1] = rare_share
    return table


def salient_material(rng: np.random.Generator, scene: Scene) -> int:
    """The material that an image-level caption mentions: drawn by area, weighted towards the centre."""
    y, x = pixel_grid()
    radius = np.hypot(y - (SIZE - 1) / 2, x - (SIZE - 1) / 2) / (SIZE / 2)
    salience = np.bincount(scene.labels.ravel(), weights=np.exp(-2 * radius**2).ravel(), minlength=NUM_MATERIALS)
    return int(rng.choice(NUM_MATERIALS, p=salience / salience.sum()))


def long_prefix(rng: np.random.Generator, clauses: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Concatenated tokens of random clauses to put before a name, at most ``limit``.

    Captions of one clause leave most text positions untrained, and what uses such positions later (such as a learned
    prompt of many vectors) is meaningless. Long captions that end in the name train all positions.

    Args:
        clauses: token ids of clauses, without start and end.
        limit: largest number of tokens.
    """
    length = int(rng.integers(0, limit + 1))
    tokens: list[int] = []
    while len(tokens) < length:
        tokens.extend(clauses[int(rng.integers(len(clauses)))])
    return tokens[len(tokens) - length :]


@dataclass
class Pictures:
    """Rendered training pictures.

    Attributes:
        images: uint8 (B, 3, S, S).
        fractions: float32 (B, h, w, C), how much of each patch each material covers.
        salient: int64 (B, draws), materials that captions of the image mention.
    """

    images: Tensor
    fractions: np.ndarray
    salient: np.ndarray


def _render_compositions(
    world: World, seed: int, start: int, stop: int, patch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, fractions, salient = [], [], []
    for index in range(start, stop):
        scene = render_composition(seed, index, world)
        grid = scene.labels.shape[0] // patch
        one_hot = scene.labels[..., None] == np.arange(NUM_MATERIALS)
        images.append(scene.image.transpose(2, 0, 1))
        fractions.append(one_hot.reshape(grid, patch, grid, patch, -1).mean(axis=(1, 3), dtype=np.float32))
        rng = np.random.default_rng([seed, index])
        salient.append([salient_material(rng, scene) for _ in range(SALIENCE_DRAWS)])
    return np.stack(images), np.stack(fractions), np.array(salient)


def _render_close_ups(
    world: World, seed: int, start: int, stop: int, patch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Close-ups show every material equally often in every world: they teach names, not frequencies."""
    pictures = [render_close_up(seed, index) for index in range(start, stop)]
    grid = pictures[0][0].shape[0] // patch
    materials = np.array([material for _, material in pictures])
    fractions = np.eye(NUM_MATERIALS, dtype=np.float32)[materials][:, None, None].repeat(grid, 1).repeat(grid, 2)
    return (
        np.stack([image.transpose(2, 0, 1) for image, _ in pictures]),
        fractions,
        materials[:, None].repeat(SALIENCE_DRAWS, 1),
    )


def render_pictures(world: World, seed: int, count: int, close_ups: bool, patch: int, threads: int) -> Pictures:
    """Render ``count`` compositions or close-ups in ``threads`` processes; the result does not depend on their
    number."""
    render = _render_close_ups if close_ups else _render_compositions
    bounds = list(range(0, count, JOB_SIZE)) + [count]
    with ProcessPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(render, world, seed, start, stop, patch)
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        images, fractions, salient = (
            np.concatenate(parts) for parts in zip(*(job.result() for job in jobs), strict=True)
        )
    return Pictures(torch.from_numpy(images), fractions, salient)


class CaptionTokens:
    """Tokens of all names in all templates, renumbered to the K kept ones; end stays the largest."""

    def __init__(self, tokenizer: object, templates: Sequence[str]) -> None:
        """
        Args:
            tokenizer: CLIP's, from ``open_clip.get_tokenizer``.
            templates: texts with one ``{}`` for the name.
        """
        names = name_vocabulary()
        texts = tokenizer([template.format(name) for template in templates for name in names])
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        self.token_ids = torch.unique(torch.cat([texts.flatten(), torch.tensor([0, start, end])]))
        self.start, self.end = (int(torch.searchsorted(self.token_ids, torch.tensor(i))) for i in (start, end))
        self.context_length = texts.shape[1]
        compact = torch.searchsorted(self.token_ids, texts).view(len(templates), len(names), -1)
        # bodies[t][j]: tokens of template t with name j, without start, end and padding.
        self.bodies = [[row[1 : int(row.argmax())].tolist() for row in rows] for rows in compact]

    def draw(self, rng: np.random.Generator, long: bool) -> Tensor:
        """One caption per name, int64 (N, T): the same template for all, after other clauses if ``long``."""
        template = self.bodies[int(rng.integers(len(self.bodies)))]
        prefix: list[int] = []
        if long:
            clauses = [body for bodies in self.bodies for body in bodies]
            prefix = long_prefix(rng, clauses, self.context_length - 2 - max(len(body) for body in template))
        tokens = torch.zeros(len(template), self.context_length, dtype=torch.int64)
        for row, body in zip(tokens, template, strict=True):
            text = [self.start, *prefix, *body, self.end]
            row[: len(text)] = torch.tensor(text)
        return tokens


def draw_regions(rng: np.random.Generator, fractions: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Draw boxes of 2-4 patches per side that show one material, up to ``BOXES_PER_IMAGE`` per image.

    One material covers at least ``BOX_PURITY`` of each box.

    Args:
        fractions: (B, h, w, C).

    Returns:
        Image of each region int64 (R,), its mean over patches as a weight matrix float32 (R, n), its material
        int64 (R,).
    """
    grid = fractions.shape[1]
    owners, weights, materials = [], [], []
    for image, cover in enumerate(fractions):
        found = 0
        for height, width in rng.integers(2, 5, (4 * BOXES_PER_IMAGE, 2)):
            top, left = rng.integers(0, grid - height + 1), rng.integers(0, grid - width + 1)
            share = cover[top : top + height, left : left + width].mean(axis=(0, 1))
            if share.max() < BOX_PURITY:
                continue
            weight = np.zeros((grid, grid), dtype=np.float32)
            weight[top : top + height, left : left + width] = 1 / (height * width)
            owners.append(image)
            weights.append(weight.ravel())
            materials.append(int(share.argmax()))
            found += 1
            if found == BOXES_PER_IMAGE:
                break
    return torch.tensor(owners), torch.from_numpy(np.stack(weights)), torch.tensor(materials)
