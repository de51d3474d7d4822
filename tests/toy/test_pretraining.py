"""Captions, names and pretraining batches of the embedded world."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from reclip_d2.backbones.embedded import EMBEDDED_MODEL_NAME, register_embedded_config
from reclip_d2.backbones.query import get_templates
from reclip_d2.toy import pretraining
from reclip_d2.toy.scenes import Scene, render_close_up, render_composition
from reclip_d2.toy.worlds import EMBEDDED, MATERIALS, NUM_MATERIALS, name_vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    register_embedded_config()
    return open_clip.get_tokenizer(EMBEDDED_MODEL_NAME)


@pytest.fixture(scope="module")
def caption_tokens(tokenizer):
    return pretraining.CaptionTokens(tokenizer, get_templates("imagenet_scene"))


def test_name_frequencies_by_hand():
    table = pretraining.name_frequencies(0.03)
    assert table.shape == (12, 24)
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-6)
    water = [m.key for m in MATERIALS].index("water")
    names = name_vocabulary()
    assert table[water, names.index("water")] == pytest.approx(0.97)
    assert table[water, names.index("lake")] == pytest.approx(0.03)
    assert np.count_nonzero(table) == 24


def test_salience_prefers_the_centre():
    labels = np.zeros((96, 96), dtype=np.uint8)
    labels[24:72, 24:72] = 1  # a quarter of the area, in the middle
    scene = Scene(np.zeros((96, 96, 3), np.uint8), labels, np.array([0, 1]), np.array([0.2, 0.2]))
    rng = np.random.default_rng(0)
    share = np.mean([pretraining.salient_material(rng, scene) for _ in range(1000)])
    y, x = (np.mgrid[0:96, 0:96] - 47.5) / 48
    weight = np.exp(-2 * (y**2 + x**2))
    expected = weight[24:72, 24:72].sum() / weight.sum()
    assert expected > 0.4
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000)


def test_long_prefix_reaches_every_length():
    rng = np.random.default_rng(0)
    clauses = [[1, 2, 3], [4, 5]]
    lengths = [len(pretraining.long_prefix(rng, clauses, 10)) for _ in range(500)]
    assert set(lengths) == set(range(11))


def test_caption_tokens_decode_to_the_text(tokenizer, caption_tokens):
    rng = np.random.default_rng(0)
    for _ in range(5):
        tokens = caption_tokens.draw(rng, long=False)
        assert tokens.shape == (24, 77)
        for name, row in zip(name_vocabulary(), tokens, strict=True):
            ids = caption_tokens.token_ids[row]
            end = int(ids.argmax())
            assert ids[0] == tokenizer.sot_token_id and ids[end] == tokenizer.eot_token_id
            text = tokenizer.decode(ids[1:end].tolist())
            assert name in text.split() or name in text.replace(".", " ").split()


def test_long_captions_use_late_positions(caption_tokens):
    rng = np.random.default_rng(0)
    ends = torch.stack([caption_tokens.draw(rng, long=True).argmax(dim=1) for _ in range(60)])
    assert int(ends.max()) >= 70 and int(ends.min()) < 20


def test_kept_tokens_are_those_of_all_names_in_all_templates(tokenizer, caption_tokens):
    used = {tokenizer.sot_token_id, tokenizer.eot_token_id, 0}
    for template in get_templates("imagenet_scene"):
        for name in name_vocabulary():
            used.update(tokenizer.encode(template.format(name)))
    assert set(caption_tokens.token_ids.tolist()) == used


def test_pictures_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(pretraining, "JOB_SIZE", 2)
    one = pretraining.render_pictures(EMBEDDED, 3, 5, False, 8, 1)
    two = pretraining.render_pictures(EMBEDDED, 3, 5, False, 8, 2)
    assert torch.equal(one.images, two.images) and np.array_equal(one.salient, two.salient)
    scene = render_composition(3, 4)
    assert np.array_equal(one.images[4].permute(1, 2, 0).numpy(), scene.image)
    patch = scene.labels[8:16, 80:88]
    np.testing.assert_allclose(one.fractions[4, 1, 10], np.bincount(patch.ravel(), minlength=12) / 64)


def test_close_up_pictures_name_their_material():
    pictures = pretraining.render_pictures(EMBEDDED, 3, 4, True, 8, 1)
    for index in range(4):
        image, material = render_close_up(3, index)
        assert np.array_equal(pictures.images[index].permute(1, 2, 0).numpy(), image)
        assert (pictures.salient[index] == material).all()
        assert (pictures.fractions[index, :, :, material] == 1).all()


def test_regions_are_pure_boxes():
    rng = np.random.default_rng(0)
    labels = np.zeros((4, 12, 12), dtype=int)
    labels[:, :, 6:] = 1
    labels[3] = np.arange(144).reshape(12, 12) % NUM_MATERIALS  # no box of this image is pure
    fractions = np.eye(NUM_MATERIALS, dtype=np.float32)[labels]
    owners, weights, materials = pretraining.draw_regions(rng, fractions)
    assert set(owners.tolist()) == {0, 1, 2}
    assert max(np.bincount(owners)) <= pretraining.BOXES_PER_IMAGE
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))
    for owner, weight, material in zip(owners, weights, materials, strict=True):
        box = weight.view(12, 12) > 0
        height, width = int(box.any(dim=1).sum()), int(box.any(dim=0).sum())
        assert 2 <= height <= 4 and 2 <= width <= 4 and int(box.sum()) == height * width
        inside = labels[int(owner)][box.numpy()]
        assert (inside == int(material)).mean() >= pretraining.BOX_PURITY
