"""Held-out views: which they are, their labels against the model's own, and that training does not draw them."""

from pathlib import Path

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.sampling import NumberedDataset
from reclip_d2.features.held_out import HeldOutViews
from reclip_d2.features.training import fixed_views, held_out_views, spread
from tests.helpers import (
    make_distillation,
    make_maskclip,
    make_rectified,
    random_image,
    tiny_config,
    watch_opened_files,
    write_scenes,
)


@pytest.fixture
def records(tmp_path) -> list[dict]:
    written = write_scenes(tmp_path / "train", 6, size=(24, 40))
    return [{"file_name": r["file_name"], "image_id": str(i), "hypothesis": [0]} for i, r in enumerate(written)]


@pytest.fixture
def config(tmp_path, records) -> Path:
    (tmp_path / "config.yaml").write_text(
        f"""{tiny_config(tmp_path)}
DATASETS: {{TRAIN: [reclip_test_train], TEST: []}}
INPUT: {{MIN_SIZE_TRAIN: [24], MIN_SIZE_TEST: 24}}
SEED: 0
SOLVER: {{PLATEAU: {{ENABLED: true}}}}
"""
    )
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("total", "number", "indices"),
    [(1, 16, [0]), (4, 16, [0]), (5, 16, [0, 2]), (12, 16, [0, 4, 8]), (100, 3, [0, 33, 66]), (8, 1, [0])],
)
def test_spread(total, number, indices):
    assert spread(total, number) == indices


def test_views_are_held_out_only_if_the_image_has_others(config):
    def views(*keys: str) -> list[int]:
        return sorted(held_out_views(load_config(str(config), keys), 6))

    assert views("FEATURE_STORE.VIEWS", "3") == [0, 9]  # images 0 and 3
    assert views("FEATURE_STORE.VIEWS", "3", "SOLVER.PLATEAU.IMAGES", "1") == [0]
    assert views("FEATURE_STORE.VIEWS", "1") == views() == []
    assert views("FEATURE_STORE.VIEWS", "3", "SOLVER.PLATEAU.ENABLED", "False") == []


@pytest.mark.parametrize("limit", ["50", "1e-9"], ids=["store", "pixels"])
def test_training_does_not_draw_them(config, records, limit):
    keys = ["FEATURE_STORE.VIEWS", "2", "FEATURE_STORE.KIND", "whole", "FEATURE_STORE.MAX_SIZE", limit]
    cfg = load_config(str(config), keys)
    model = make_rectified()
    dataset = fixed_views(cfg, model, records)
    (name,) = {"features", "image"} & set(dataset.sample(0)) - ({"image"} if limit == "50" else set())
    drawn = [dataset[draw, 0][name] for draw in range(12)]
    assert all(torch.equal(view, dataset.sample(1)[name]) for view in drawn)
    other = [dataset[draw, 1][name] for draw in range(12)]  # of another image both views are drawn
    assert {torch.equal(view, dataset.sample(2)[name]) for view in other} == {True, False}

    views = HeldOutViews.of(cfg, dataset, 16)
    assert all(torch.equal(s[name], dataset.sample(n)[name]) for s, n in zip(views.samples, (0, 6), strict=True))
    model.eval()
    features = dataset.store.read(0).features if dataset.store else model.view_encoder(dataset.sample(0)["image"])[0]
    logits = model.segment_views(model.view_batch([{"features": features.half(), "view_size": (24, 40)}]))
    labels = views.labels(model)
    assert labels.shape == (2 * 3 * 5,) and torch.equal(labels[:15].long(), logits.argmax(1).flatten())


def test_without_a_store_they_are_images_at_test_size(config, records):
    cfg = load_config(str(config))
    dataset = NumberedDataset(records, UnlabelledDatasetMapper(cfg, is_train=True), 0)
    with watch_opened_files(lambda path: None if "annotations" not in path else pytest.fail(path)):
        views = HeldOutViews.of(cfg, dataset, 16)
    assert [sample["image_id"] for sample in views.samples] == ["0", "3"]
    assert [tuple(sample["image"].shape) for sample in views.samples] == [(3, 24, 40)] * 2


@pytest.mark.parametrize("make", [make_rectified, make_distillation, lambda: make_distillation(make_maskclip())])
def test_labels_are_those_of_inference(make):
    """Whatever the mode of the model, which is kept."""
    model = make()
    views = HeldOutViews([{"image": random_image(seed)} for seed in range(2)])
    found = views.labels(model)
    assert model.training
    segmentor = getattr(model.eval(), "student", model)
    with torch.no_grad():
        batch = segmentor.preprocess_image([{"image": random_image(1)}])
        expected = segmentor.mask_logits(batch.tensor, batch.image_sizes).argmax(1).flatten()
    assert torch.equal(found[16:].long(), expected)  # grids of 4 x 4
    assert torch.equal(views.labels(model), found) and not model.training


def test_a_trained_tower_is_run_again():
    model = make_rectified()
    views = HeldOutViews([{"image": random_image(3)}])
    before = views.labels(model)
    assert "features" in views.samples[0]
    model.backbone.requires_grad_(True)
    again = HeldOutViews([{"image": random_image(3)}])
    assert torch.equal(again.labels(model), before) and "features" not in again.samples[0]
