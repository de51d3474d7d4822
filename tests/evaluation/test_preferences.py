"""Preferences by class and place: statistics by hand, and on tiny models against the models' own logits."""

import math

import numpy as np
import pytest
import torch

from reclip_d2.evaluation.logit_parts import crop_to_image, has_bias, logit_parts
from reclip_d2.evaluation.preferences import (
    Preference,
    agreement,
    mean_bias,
    mean_probability,
    place_means,
    preference_of_bias,
    preference_of_probabilities,
    preferred_places,
    spread_records,
)
from tests.helpers import make_maskclip, make_rectified, random_image


def mapper(record: dict) -> dict:
    """Stands for the mapper: the record holds its image."""
    return record


def images(*sizes: tuple[int, int]) -> list[dict]:
    return [{"image": random_image(seed, *size)} for seed, size in enumerate(sizes)]


def test_probabilities_by_hand():
    mean = np.array([[[0.9, 0.5]], [[0.1, 0.5]]])
    preference = preference_of_probabilities(mean, 3)
    np.testing.assert_allclose(preference.maps, np.log([[[1.8, 1.0]], [[0.2, 1.0]]]))
    np.testing.assert_allclose(preference.strengths, np.log([1.4, 0.6]))
    np.testing.assert_allclose(preference.place_maps[0], np.log([[1.8 / 1.4, 1 / 1.4]]))
    assert preference.source == "mean soft-max" and preference.images == 3
    assert np.isfinite(preference_of_probabilities(np.array([[[1.0]], [[0.0]]]), 1).maps).all()


def test_bias_by_hand():
    bias = np.array([[[0.3, 0.1]], [[0.1, 0.1]]])
    preference = preference_of_bias(bias, logit_scale=10, images=1)
    np.testing.assert_allclose(preference.maps, [[[1, 0]], [[-1, 0]]], atol=1e-12)
    np.testing.assert_allclose(preference.strengths, [0.5, -0.5])


def test_places_by_hand():
    maps = np.arange(36.0).reshape(1, 6, 6)
    expected = [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5], [27.5, 29.5, 31.5]]
    assert place_means(maps)[0].tolist() == expected
    assert place_means(np.array([[[1.0, 2.0]]]))[0].tolist() == [[1, 1.5, 2]] * 3  # two cells in three places


def test_preferred_places():
    maps = np.zeros((2, 3, 3))
    maps[0, 0, 0], maps[0, 2, 1] = 3.0, -2.0
    maps[1, 1, 1], maps[1, 0, 2] = 5.0, -1.0
    lines = preferred_places(Preference(maps, np.array([0.0, 1.0]), "bias logits", 1), ["sky", "wood"])
    assert [line.name for line in lines] == ["wood", "sky"]
    wood, sky = lines
    assert (wood.best_place, wood.worst_place, wood.best) == ("centre", "top-right", 4.0)  # minus its own strength
    assert (sky.best_place, sky.worst_place, sky.worst) == ("top-left", "bottom", -2.0)


def test_agreement():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 3, 5))
    first = Preference(maps, maps.mean((1, 2)), "bias logits", 1)
    opposite = Preference(-2 * maps, -2 * first.strengths, "bias logits", 1)
    assert agreement(first, first) == pytest.approx((1, 1)) and agreement(first, opposite) == pytest.approx((-1, -1))
    larger = np.kron(maps, np.ones((1, 3, 3)))
    assert agreement(first, Preference(larger, first.strengths, "mean soft-max", 9))[1] == pytest.approx(1, abs=0.1)
    flat = Preference(np.zeros_like(maps), np.zeros(4), "bias logits", 1)
    assert all(map(math.isnan, agreement(first, flat)))


def test_spread_records():
    records = [{"id": i} for i in range(10)]
    assert [r["id"] for r in spread_records(records, 4)] == [0, 3, 6, 9]
    assert spread_records(records, 99) == records and spread_records(records, 0) == []
    assert [r["id"] for r in spread_records(records, 1)] == [0]


def test_mean_soft_max_of_maskclip():
    model = make_maskclip()
    records = images((32, 40), (32, 40))
    maps = []
    for record in records:
        logits = model.mask_logits(model.preprocess_image([record]).tensor)[0].double()
        maps.append((logits * model.backbone.logit_scale).softmax(0).numpy())
    preference = mean_probability(model, mapper, records)
    np.testing.assert_allclose(preference.maps, np.log(4 * np.mean(maps, 0)), rtol=1e-4, atol=1e-5)
    assert preference.maps.shape == (4, 4, 5) and preference.images == 2


def test_images_of_other_sizes_and_padding():
    preference = mean_probability(make_maskclip(), mapper, images((30, 44), (48, 24)))
    assert preference.maps.shape == (4, 4, 5)  # 44 px: 5.5 patches of 8; the half in the padding is left out
    np.testing.assert_allclose(np.exp(preference.maps).sum(0), 4, rtol=1e-5)  # still probabilities


@pytest.mark.parametrize(("rectification", "sign"), [("subtract", 1), ("add", -1)])
@pytest.mark.parametrize("decoder", [True, False])
def test_logits_taken_apart(rectification, sign, decoder):
    model = make_rectified(rectification=rectification, decoder=decoder).eval()
    record = images((32, 40))[0]
    parts = logit_parts(model, mapper, record)
    with torch.no_grad():
        bias = model.bias_logits((4, 5)).T.unflatten(1, (4, 5))
        tensor = model.preprocess_image([record]).tensor
        torch.testing.assert_close(parts.mask, model.mask_logits(tensor)[0])
    torch.testing.assert_close(parts.bias, sign * bias, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.query - parts.bias, parts.rectified)
    if not decoder:
        torch.testing.assert_close(parts.rectified, parts.mask)
    assert parts.labels(parts.mask, (64, 80)).shape == (64, 80)
    assert parts.at_pixels(parts.bias[:2], (64, 80)).shape == (2, 64, 80)


def test_preference_of_the_bias_logits():
    model = make_rectified().eval()
    preference = mean_bias(model, mapper, images((32, 40), (32, 40)))
    bias = model.bias_logits((4, 5)).detach().T.unflatten(1, (4, 5)).double()
    expected = (bias - bias.mean(0)) * model.backbone.logit_scale
    np.testing.assert_allclose(preference.maps, expected.numpy(), atol=1e-4)
    assert preference.images == 1  # it is the same for all images


def test_which_models_have_a_bias():
    assert has_bias(make_rectified())
    assert not has_bias(make_rectified(rectification="none"))
    assert not has_bias(make_maskclip())


def test_crop_to_image():
    grid = torch.arange(12.0).reshape(3, 4)
    assert crop_to_image(grid, (24, 32), (24, 32)).shape == (3, 4)
    assert crop_to_image(grid, (24, 32), (17, 21)).tolist() == [[0, 1, 2], [4, 5, 6]]
    assert crop_to_image(grid, (24, 32), (3, 32)).shape == (1, 4)
