"""Hypotheses from dense labels (``reclip_d2.hypothesis.dense``)."""

import json
import logging
import shutil

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.features.store import build_store, images_digest
from reclip_d2.features.training import fixed_views
from reclip_d2.features.views import ViewPlan
from reclip_d2.hypothesis.dense import class_offset, sample_features, whole_view
from reclip_d2.hypothesis.training_records import build_training_records, unlabelled_records
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from tests.helpers import isolated_cache, make_maskclip, register_tiny_model, tiny_dense, write_scenes

__all__ = ["isolated_cache"]

NAMES = ["sky", "tall tree", "water", "brick wall"]


@pytest.fixture
def cfg(tmp_path, datasets, isolated_cache):
    records = write_scenes(tmp_path / "wide", 3, size=(34, 60)) + write_scenes(tmp_path / "tall", 2, size=(50, 36))
    for number, record in enumerate(records):
        record["image_id"] = str(number)
    datasets("reclip_test_train", records, NAMES)
    keys = {
        "MODEL.CLIP.NAME": register_tiny_model(tmp_path), "MODEL.CLIP.PRETRAINED": "random", "MODEL.DEVICE": "cpu",
        "MODEL.CLIP.TEMPLATES": "photo", "MODEL.BACKBONE.NAME": "DenseCLIP", "INPUT.MIN_SIZE_TEST": "0",
        "DATASETS.TRAIN": "('reclip_test_train',)", "HYPOTHESIS.METHOD": "dense", "HYPOTHESIS.THRESHOLD": "0.1",
    }  # fmt: skip
    return load_config("", [part for pair in keys.items() for part in pair])


def literal_shares(cfg, offset: torch.Tensor) -> list[list[float]]:
    """Share of each class among the labels of the patches of each image, by a loop over MaskCLIP's logits."""
    model = MaskCLIP(cfg).eval()
    result = []
    for record in unlabelled_records(cfg.DATASETS.TRAIN):
        image = UnlabelledDatasetMapper(cfg, is_train=False)(record)
        images = model.preprocess_image([image])
        with torch.no_grad():
            logits = model.segment(images.tensor, images.image_sizes)[1][0]
        height, width = image["image"].shape[1:]
        counts, patches = [0] * 4, 0
        for i in range(logits.shape[1]):
            for j in range(logits.shape[2]):
                if 8 * i + 4 < height and 8 * j + 4 < width:  # the patch's centre lies in the image
                    counts[int((logits[:, i, j] + offset).argmax())] += 1
                    patches += 1
        result.append([count / patches for count in counts])
    return result


def lines_of(cache) -> list[dict]:
    (file,) = (cache / "hypotheses").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_shares_of_clips_own_labels_against_a_loop(cfg, isolated_cache):
    cfg.HYPOTHESIS.CLASS_SHARES = "own"
    records = build_training_records(cfg)
    header, *lines = lines_of(isolated_cache)
    assert header["method"] == "dense" and header["class_shares"] == "own"
    expected = literal_shares(cfg, torch.zeros(4))
    for record, line, shares in zip(records, lines, expected, strict=True):
        assert line["scores"] == pytest.approx(shares, abs=0.02)  # a patch may tie after rounding to half precision
        above = [k for k, share in enumerate(line["scores"]) if share > 0.1]
        assert record["hypothesis"] == (above or [max(range(4), key=lambda k: line["scores"][k])])
        assert line["image_id"] == record["image_id"]
    assert lines[0]["size"] == [34, 60] and lines[4]["size"] == [50, 36]


@pytest.mark.parametrize("shares", ["uniform", "estimated"])
def test_calibrated_labels_against_a_loop(cfg, isolated_cache, shares, caplog):
    cfg.HYPOTHESIS.CLASS_SHARES = shares
    with caplog.at_level(logging.INFO):
        build_training_records(cfg)
    assert ("estimated class shares: 0." in caplog.text) == (shares == "estimated")
    model = MaskCLIP(cfg)
    store = store_of(cfg, model)
    offset = class_offset(sample_features(store), model.query_features, model.backbone.logit_scale, shares)
    assert offset.abs().max() > 0
    for line, expected in zip(lines_of(isolated_cache)[1:], literal_shares(cfg, offset), strict=True):
        assert line["scores"] == pytest.approx(expected, abs=0.04)


def store_of(cfg, model):
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    store = build_store(cfg, model.backbone, records, ViewPlan.whole_images(cfg), images_digest(records))
    store.make(model.view_encoder)
    return store


def test_padding_is_left_out_and_samples_are_spread(cfg):
    model = make_maskclip()
    store = store_of(cfg, model)
    features, size = whole_view(store, 0)
    assert features.shape == (4 * 7, 24)  # 34 x 60 px: of 5 x 8 patches those in the padding, by half and more, go
    assert size == (34, 60)
    total = sum(len(whole_view(store, image)[0]) for image in range(5))
    assert len(sample_features(store)) == total
    few = sample_features(store, 20)
    assert 10 <= len(few) <= 20
    assert len(sample_features(store, 2)) == 3  # one patch of every second image


def test_shares_are_asked_for():
    backbone = tiny_dense()
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(500, 6, generator=generator), dim=1)
    query = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator), dim=1)
    assert (class_offset(features, query, backbone.logit_scale, "own") == 0).all()
    offset = class_offset(features, query, 10.0, "uniform")
    after = ((features @ query.T + offset) * 10).softmax(1).mean(0)
    torch.testing.assert_close(after, torch.full((3,), 1 / 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "stores"), [("whole", 1), ("crops", 2)])
def test_training_shares_a_store_of_whole_images(cfg, isolated_cache, kind, stores):
    cfg.FEATURE_STORE.VIEWS, cfg.FEATURE_STORE.KIND = 2, kind
    fixed_views(cfg, MaskCLIP(cfg), build_training_records(cfg))
    assert len(list((isolated_cache / "features").glob("reclip*"))) == stores


def test_what_the_file_depends_on(cfg, isolated_cache):
    build_training_records(cfg)
    cfg.HYPOTHESIS.CLASS_SHARES = "uniform"
    build_training_records(cfg)
    cfg.INPUT.MIN_SIZE_TEST = 40
    build_training_records(cfg)
    cfg.MODEL.CLIP.VALUE_PATH_RESIDUAL = False
    build_training_records(cfg)
    assert len(list((isolated_cache / "hypotheses").glob("*.jsonl"))) == 4


def test_no_room_for_the_store(cfg, isolated_cache, caplog):
    """The images are encoded twice instead: the hypotheses are the same, and nothing is stored."""
    expected = [record["hypothesis"] for record in build_training_records(cfg)]
    for folder in ("features", "hypotheses"):
        shutil.rmtree(isolated_cache / folder)
    cfg.FEATURE_STORE.MAX_SIZE = 1e-9
    with caplog.at_level(logging.WARNING):
        assert [record["hypothesis"] for record in build_training_records(cfg)] == expected
    assert "5 images x 1 views need" in caplog.text and "encoding each image twice" in caplog.text
    assert not list((isolated_cache / "features").rglob("*.safetensors"))


def test_classes_per_image(cfg):
    cfg.HYPOTHESIS.CLASSES_PER_IMAGE = 2.0
    records = build_training_records(cfg)
    assert 1 <= sum(len(record["hypothesis"]) for record in records) / len(records) <= 3
