"""Scenes of the embedded world: determinism, complete labels, places in the task and in pretraining."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy.stats import chi2

from reclip_d2.toy import scenes
from reclip_d2.toy.noise import SIZE, cell_distances, scattered_stamps, value_noise
from reclip_d2.toy.worlds import (
    EMBEDDED_CLASSES,
    EMBEDDED_COLORS,
    MATERIALS,
    NUM_MATERIALS,
    name_vocabulary,
    partner,
)


@pytest.fixture(scope="module")
def task_scenes() -> list[scenes.Scene]:
    return [scenes.render_scene(5, index) for index in range(150)]


@pytest.fixture(scope="module")
def compositions() -> list[scenes.Scene]:
    return [scenes.render_composition(5, index) for index in range(150)]


def rows_of(pictures: list[scenes.Scene], material: int) -> np.ndarray:
    """Mean row of each region of ``material``, 0 (top) to 1 (bottom)."""
    return np.array([np.nonzero(s.labels == material)[0].mean() / SIZE for s in pictures if material in s.labels])


def radii_of(pictures: list[scenes.Scene], material: int) -> np.ndarray:
    """Mean distance of each region of ``material`` from the centre, in half image sides."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE / 2) - 1
    radius = np.hypot(y, x)
    return np.array([radius[s.labels == material].mean() for s in pictures if material in s.labels])


@pytest.mark.parametrize("render", [scenes.render_scene, scenes.render_composition])
def test_scene_depends_on_seed_and_index_alone(render):
    first = render(3, 7)
    np.random.seed(99)
    render(3, 8)
    again = render(3, 7)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, render(3, 8).image)
    assert not np.array_equal(first.image, render(4, 7).image)


def test_rendering_leaves_the_global_generator_alone():
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    scenes.render_scene(0, 0)
    scenes.render_close_up(0, 0)
    assert np.random.random() == expected


def test_close_up_is_deterministic_and_in_range():
    image, material = scenes.render_close_up(3, 7)
    again, same = scenes.render_close_up(3, 7)
    assert np.array_equal(image, again) and material == same
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 and 0 <= material < NUM_MATERIALS


def test_kinds_of_pictures_share_no_random_numbers():
    digests = {
        hashlib.sha256(image.tobytes()).hexdigest()
        for image in (
            scenes.render_scene(0, 0).image,
            scenes.render_composition(0, 0).image,
            scenes.render_close_up(0, 0)[0],
        )
    }
    assert len(digests) == 3


def test_every_pixel_is_labelled_and_regions_match(task_scenes):
    for scene in task_scenes:
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.labels.shape == (SIZE, SIZE) and scene.labels.dtype == np.uint8
        assert set(np.unique(scene.labels)) <= set(scene.materials.tolist())
        assert len(set(scene.materials.tolist())) == len(scene.materials) in scenes.REGION_COUNTS
        assert scene.materials.min() >= 0 and scene.materials.max() < NUM_MATERIALS
        low, high = scenes.BLEND_RANGE
        assert (scene.blends >= low).all() and (scene.blends <= high).all()


def test_a_region_is_a_mix_of_its_material_and_its_partner():
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    blended = scenes._blended_texture(rng, 6, 0.25)
    rng.bit_generator.state = state
    own = np.clip(scenes.TEXTURES[6](rng), 0, 1)
    other = np.clip(scenes.TEXTURES[7](rng), 0, 1)
    np.testing.assert_allclose(blended, 0.75 * own + 0.25 * other, atol=1e-6)


@pytest.mark.parametrize("material", range(NUM_MATERIALS))
def test_textures_are_float32_pictures_that_vary(material):
    first = scenes.TEXTURES[material](np.random.default_rng(0))
    second = scenes.TEXTURES[material](np.random.default_rng(1))
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.float32 and np.isfinite(first).all()
    assert np.abs(first - second).mean() > 0.01
    assert first.std(axis=(0, 1)).max() > 0.02
    assert (first < -0.2).mean() < 0.02 and (first > 1.3).mean() < 0.02


def test_preferences_of_a_pair_are_opposite():
    y, x = np.random.default_rng(0).random((2, 50))
    preference = scenes.place_preference(y, x)
    assert preference.shape == (50, NUM_MATERIALS) and np.abs(preference).max() <= 1
    for material in range(NUM_MATERIALS):
        np.testing.assert_allclose(preference[:, material], -preference[:, partner(material)])
    assert scenes.place_preference(0.0, 0.5)[0] == 1 and scenes.place_preference(1.0, 0.5)[0] == -1


def test_compositions_put_materials_in_their_places_and_the_task_does_not(task_scenes, compositions):
    for material in MATERIALS[::2]:
        index = MATERIALS.index(material)
        measure, sign = (rows_of, -1) if material.place == "up" else (radii_of, 1)
        preferred = measure(compositions, index).mean() - measure(compositions, partner(index)).mean()
        own, other = measure(task_scenes, index), measure(task_scenes, partner(index))
        noise = np.sqrt(own.var() / len(own) + other.var() / len(other))
        assert sign * preferred > 0.08, material.key
        # 4 standard errors: six pairs all pass in more than 99.9 % of worlds that have no preference.
        assert abs(own.mean() - other.mean()) < 4 * noise, material.key


def test_task_draws_materials_by_their_weights(task_scenes):
    counts = np.bincount(np.concatenate([s.materials[:1] for s in task_scenes]), minlength=NUM_MATERIALS)
    weights = np.array([m.task_weight for m in MATERIALS])
    expected = counts.sum() * weights / weights.sum()
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, NUM_MATERIALS - 1)


def test_vocabulary_is_consistent():
    assert len(set(EMBEDDED_CLASSES)) == len(set(EMBEDDED_COLORS)) == NUM_MATERIALS == 12
    assert len(set(name_vocabulary())) == 24
    renamed = [m for m in MATERIALS if m.task_name == m.rare_name]
    assert {m.task_name for m in renamed} == {"lake", "lawn", "desert", "wall", "rock", "plants"}
    assert all(m.task_name in (m.common_name, m.rare_name) for m in MATERIALS)
    colors = np.array(EMBEDDED_COLORS, dtype=float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e3 * np.eye(NUM_MATERIALS)
    assert distances.min() > 40 and colors.min() >= 0 and colors.max() <= 255


def test_value_noise_has_zero_mean_and_unit_variance():
    fields = np.stack([value_noise(np.random.default_rng(seed), 12, 24) for seed in range(40)])
    assert abs(fields.mean()) < 0.05 and abs(fields.std() - 1) < 0.05


def test_cell_distances_equal_brute_force():
    cell, aspect = 16.0, 1.5
    nearest, second, _ = cell_distances(np.random.default_rng(2), cell, aspect)
    rows, cols = int(SIZE / cell) + 4, int(SIZE / (cell * aspect)) + 4
    draws = np.random.default_rng(2).random((3, rows, cols), dtype=np.float32)
    grid_y, grid_x = np.mgrid[0:rows, 0:cols]
    points = np.stack([grid_y + 0.1 + 0.8 * draws[0], grid_x + 0.1 + 0.8 * draws[1]], axis=-1).reshape(-1, 2)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    pixels = np.stack([y / cell + 1.5, x / (cell * aspect) + 1.5], axis=-1)
    distances = np.sort(np.linalg.norm(pixels[:, :, None] - points, axis=-1), axis=-1)
    np.testing.assert_allclose(nearest, distances[..., 0], atol=1e-4)
    # The second nearest point may lie beyond the 3 x 3 cells that are searched, rarely.
    assert (np.abs(second - distances[..., 1]) < 1e-4).mean() > 0.97


def test_scattered_stamps_stay_within_their_ellipse():
    stamps = scattered_stamps(np.random.default_rng(2), 10.0, 2.0)
    covered = stamps["depth"] >= 0
    assert 0.5 < covered.mean() < 1
    assert (stamps["u"][covered] ** 2 + (2 * stamps["v"][covered]) ** 2 < 0.85).all()
