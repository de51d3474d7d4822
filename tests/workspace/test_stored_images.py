"""Masks from the features that a run has stored."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from reclip_d2.data.class_file import parse_classes
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.image_folder import find_images
from reclip_d2.data.images import read_image
from reclip_d2.features.store import FeatureStore
from reclip_d2.inference import ImagePredictor
from reclip_d2.workspace.masks import MaskClassTable
from reclip_d2.workspace.stage_config import stage_config
from reclip_d2.workspace.stored_images import StoredImages
from reclip_d2.workspace.stores import training_stores
from reclip_d2.workspace.trained_model import load_predictor
from tests.cli.conftest import picture
from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]


@pytest.fixture
def run(tmp_path, isolated_cache):
    """Images, the config of their training, MaskCLIP, and the classes; ``custom`` has all images but the last."""
    for number, size in enumerate([(96, 96), (70, 130), (200, 150), (96, 96)]):
        Image.fromarray(picture(number, *size)).save(tmp_path / f"{number}.png")
    images = find_images([tmp_path]).images
    classes = parse_classes("sky\nwood\nfire\nbackground: road", "c.txt")
    keys = ["MODEL.DEVICE", "cpu", "MODEL.CLIP.TEMPLATES", "photo", "FEATURE_STORE.FOLDER", str(tmp_path / "features")]
    cfg = stage_config("rectified", "reclip-embedded", keys)
    predictor = load_predictor(stage_config("maskclip", "reclip-embedded", keys), "maskclip", classes)
    register_images([{"file_name": str(i.path), "image_id": str(i.name)} for i in images[:-1]], classes)
    return images, cfg, predictor, classes


def test_the_same_masks_and_scores(run, monkeypatch):
    images, cfg, predictor, classes = run
    assert StoredImages.find(cfg, predictor) is None  # not made
    (store,) = training_stores(cfg, predictor.model.backbone)
    store.make(predictor.model.view_encoder)
    stored = StoredImages.find(cfg, predictor)
    assert stored.view(images[-1]) is None
    table = MaskClassTable(classes, keep_background=False)
    expected = [table.predict(predictor, read_image(image.path), with_scores=True) for image in images[:-1]]
    monkeypatch.setattr(predictor.model.backbone, "dense_and_keys", None)  # the network is not run again
    for image, (labels, scores) in zip(images, expected, strict=False):
        view = stored.view(image)
        assert view.placement.image_size == labels.shape
        found = table.predict(predictor, view, with_scores=True)
        np.testing.assert_array_equal(found[0], labels)
        np.testing.assert_array_equal(found[1], scores)


def test_the_same_logits_of_a_decoder_bit_for_bit(run):
    """Its convolution sums in another order if the features have another layout in memory."""
    images, cfg, *_ = run
    predictor = ImagePredictor.from_config(build_model(cfg).eval(), cfg)
    (store,) = training_stores(cfg, predictor.model.backbone)
    store.make(predictor.model.view_encoder)
    stored = StoredImages.find(cfg, predictor)
    for image in images[:-1]:
        pixels, view = read_image(image.path), stored.view(image)
        expected = predictor.grid_logits(predictor.resize(pixels), pixels.shape[:2]).logits
        found = predictor.stored_logits(view.features, view.size, pixels.shape[:2]).logits
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "keys",
    [
        ("MODEL.CLIP.HALF_FEATURES", "False"),
        ("TEST.SLIDING_WINDOW.ENABLED", "True"),
        ("MODEL.MASKCLIP.KEY_SMOOTHING", "0.5"),
    ],
)
def test_predictors_that_read_something_else(run, keys, monkeypatch):
    _, cfg, _, classes = run
    monkeypatch.setattr(FeatureStore, "make", None)
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.CLIP.TEMPLATES", "photo", *keys]
    predictor = load_predictor(stage_config("maskclip", "reclip-embedded", overrides), "maskclip", classes)
    assert StoredImages.find(cfg, predictor) is None
