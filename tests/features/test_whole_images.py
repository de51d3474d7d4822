"""Features of whole images (``reclip_d2.features.whole_images``): the same from a store as encoded; encoded once."""

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.features import whole_images as module
from reclip_d2.features.store import FeatureStore
from reclip_d2.features.training import fixed_views
from reclip_d2.features.whole_images import inside_image, whole_images
from reclip_d2.hypothesis.training_records import unlabelled_records
from tests.helpers import make_maskclip, register_tiny_model, write_scenes

NAMES = ["sky", "tall tree", "water", "brick wall"]
STORE = ("FEATURE_STORE.KIND", "whole", "FEATURE_STORE.VIEWS")


@pytest.fixture
def cfg(tmp_path, datasets, isolated_cache):
    records = write_scenes(tmp_path / "wide", 3, size=(34, 60)) + write_scenes(tmp_path / "tall", 2, size=(50, 36))
    for number, record in enumerate(records):
        record["image_id"] = str(number)
    datasets("reclip_test_train", records, NAMES)
    keys = {
        "MODEL.META_ARCHITECTURE": "MaskCLIP", "MODEL.BACKBONE.NAME": "DenseCLIP",
        "MODEL.CLIP.NAME": register_tiny_model(tmp_path), "SEED": "0",
        "MODEL.CLIP.PRETRAINED": "random", "MODEL.DEVICE": "cpu", "MODEL.CLIP.TEMPLATES": "photo",
        "INPUT.MIN_SIZE_TEST": "0", "DATASETS.TRAIN": "('reclip_test_train',)", "DATASETS.TEST": "()",
    }  # fmt: skip
    return load_config("", [part for pair in keys.items() for part in pair])


def set_keys(cfg, *pairs):
    cfg = cfg.clone()
    cfg.merge_from_list(list(pairs))
    return cfg


def test_patches_inside_by_hand():
    features = torch.arange(20.0).view(4, 5, 1)
    assert torch.equal(inside_image(features, (32, 40), 8), features)
    assert torch.equal(inside_image(features, (29, 36), 8)[..., 0], features[:4, :4, 0])  # centres at 28 and at 36
    assert inside_image(features, (3, 3), 8).shape == (1, 1, 1)


@pytest.mark.parametrize("number", ["1", "2"])
def test_a_store_gives_the_encoded_features(cfg, number):
    """Also where only the training's config asks for the store, as for MaskCLIP's controls."""
    model, records = make_maskclip(), unlabelled_records(cfg.DATASETS.TRAIN)
    encoded = list(whole_images(cfg, model.backbone, records, model.view_encoder))
    stored = set_keys(cfg, *STORE, number)
    fixed_views(stored, model, records)
    for keys in (cfg, stored):
        images = whole_images(keys, model.backbone, records, model.view_encoder)
        assert isinstance(images.source, FeatureStore) and len(images) == 5
        for found, expected in zip(images, encoded, strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert encoded[0].shape[:2] == (4, 7)  # 34 x 60 px: the patches whose centre is in the image


def test_a_store_of_crops_has_no_whole_images(cfg):
    model, records = make_maskclip(), unlabelled_records(cfg.DATASETS.TRAIN)
    crops = set_keys(cfg, "FEATURE_STORE.VIEWS", "2", "INPUT.MIN_SIZE_TRAIN", "(32,)", "INPUT.CROP.SIZE", "[24,24]")
    fixed_views(crops, model, records)
    for keys in (crops, cfg):
        assert not isinstance(whole_images(keys, model.backbone, records, model.view_encoder).source, FeatureStore)


def test_the_config_completes_a_store_that_it_asks_for(cfg, isolated_cache):
    model, records = make_maskclip(), unlabelled_records(cfg.DATASETS.TRAIN)
    images = whole_images(set_keys(cfg, *STORE, "2"), model.backbone, records, model.view_encoder)
    assert isinstance(images.source, FeatureStore) and images.source.is_complete()
    too_large = set_keys(cfg, *STORE, "1", "FEATURE_STORE.MAX_SIZE", "1e-9")
    assert len(list((isolated_cache / "features").glob("*/*.safetensors"))) == 1
    again = whole_images(too_large, model.backbone, records, model.view_encoder)
    assert again.source.views.plan.number == 2  # the store that is there


@pytest.mark.parametrize("kind", ["class", "position_class", "estimated"])
def test_calibration_runs_the_tower_over_no_image_twice(cfg, kind, monkeypatch):
    """With a store of the training's views, the tower encodes nothing; the offset is the same, bit for bit."""
    keys = ("MODEL.MASKCLIP.CALIBRATION", kind)
    expected = build_evaluation_model(set_keys(cfg, *keys), resume=False).calibration_offset
    model = build_evaluation_model(cfg, resume=False)
    fixed_views(set_keys(cfg, *STORE, "2"), model, unlabelled_records(cfg.DATASETS.TRAIN))
    monkeypatch.setattr(type(model.backbone), "dense", None)
    assert torch.equal(build_evaluation_model(set_keys(cfg, *keys), resume=False).calibration_offset, expected)


def test_images_are_hashed_only_if_there_is_a_store(cfg, monkeypatch):
    monkeypatch.setattr(module, "images_digest", None)
    model = make_maskclip()
    whole_images(cfg, model.backbone, unlabelled_records(cfg.DATASETS.TRAIN), model.view_encoder)
