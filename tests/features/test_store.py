"""Making and reading a feature store (``reclip_d2.features.store``)."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.features.shards import FEWEST_VIEWS
from reclip_d2.features.store import FeatureStore, StoreKey, budget_problem, build_store, store_folder
from reclip_d2.features.views import ViewPlan, Views
from reclip_d2.utils.progress import report_to
from reclip_d2.utils.work_shard import WorkShard
from tests.helpers import tiny_dense


@pytest.fixture
def cfg():
    opts = "FEATURE_STORE.VIEWS 2 FEATURE_STORE.KIND whole INPUT.MIN_SIZE_TEST 0 SEED 0".split()
    return load_config("", opts)


@pytest.fixture
def records(tmp_path) -> list[dict]:
    found = []
    for number in range(20):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((16, 32, 3), number, np.uint8)).save(path)
        found.append({"file_name": str(path), "image_id": str(number)})
    return found


class Encoder:
    """Features that say which image they are of, on a grid of 8-pixel patches."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.calls, self.fail_after = 0, fail_after

    def __call__(self, image):
        if self.calls == self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.full((2, 4, 5), float(image[0, 0, 0])), tuple(image.shape[-2:])


def store_of(cfg, records, folder) -> FeatureStore:
    return FeatureStore(folder, Views(cfg, records, ViewPlan.from_config(cfg)), embed_dim=5, patch_size=8)


def test_made_once_and_read(cfg, records, tmp_path):
    store, encoder, seen = store_of(cfg, records, tmp_path / "store"), Encoder(), []
    with report_to(seen.append):
        store.make(encoder)
    assert encoder.calls == 40
    assert (seen[-1].stage, seen[-1].done, seen[-1].total, seen[-1].unit) == ("features", 40, 40, "view")
    for number in (0, 1, 39):
        found = store.read(number)
        assert (found.features == number // 2).all() and found.size == (16, 32)

    store_of(cfg, records, tmp_path / "store").make(Encoder(fail_after=0))  # nothing is missing
    assert store.bytes() == 40 * 2 * 4 * 5 * 2


def test_an_interrupted_making_resumes(cfg, records, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        store_of(cfg, records, tmp_path / "store").make(Encoder(fail_after=FEWEST_VIEWS + 3))
    store, encoder = store_of(cfg, records, tmp_path / "store"), Encoder()
    store.make(encoder)
    assert encoder.calls == 40 - FEWEST_VIEWS
    assert [int(store.read(number).features[0, 0, 0]) for number in range(40)] == [k // 2 for k in range(40)]


def key(**changes) -> StoreKey:
    cfg = load_config("", "FEATURE_STORE.VIEWS 2 SEED 0 INPUT.CROP.ENABLED True".split())
    values = {
        "dataset": "custom", "images": "abc", "backbone": {"clip": "ViT", "fingerprint": "f"},
        "pixel_statistics": [[1.0] * 3, [2.0] * 3], "views": ViewPlan.from_config(cfg),
    }  # fmt: skip
    return StoreKey(**{**values, **changes})


def test_the_key_holds_all_that_features_depend_on():
    def plan(*opts):
        return ViewPlan.from_config(
            load_config("", ["FEATURE_STORE.VIEWS", "2", "SEED", "0", "INPUT.CROP.ENABLED", "True", *opts])
        )

    others = [
        key(dataset="voc"), key(images="abd"), key(backbone={"clip": "ViT", "fingerprint": "g"}),
        key(pixel_statistics=[[1.0] * 3, [2.5] * 3]), key(views=plan("SEED", "1")),
        key(views=plan("FEATURE_STORE.VIEWS", "3")), key(views=plan("FEATURE_STORE.KIND", "whole")),
        key(views=plan("INPUT.CROP.SIZE", "[100,100]")), key(views=plan("INPUT.RANDOM_FLIP", "none")),
        key(views=plan("INPUT.MIN_SIZE_TRAIN", "(300,)")), key(views=plan("INPUT.COLOR_JITTER", "0.1")),
    ]  # fmt: skip
    digests = {key().digest, *(other.digest for other in others)}
    assert len(digests) == len(others) + 1 and key().digest == key().digest


def test_the_key_has_the_precision_of_the_tower(cfg, records, tmp_path):
    cfg.FEATURE_STORE.FOLDER = str(tmp_path / "stores")
    plan, backbone = ViewPlan.from_config(cfg), tiny_dense()

    def folder(precision: str) -> Path:
        cfg.MODEL.CLIP.AUTOCAST = precision
        return build_store(cfg, backbone, records, plan, "images").folder

    assert folder("auto") == folder("float32")  # on a CPU
    assert folder("bfloat16") not in (folder("float32"), folder("float16"))


def test_folder(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_CACHE", str(tmp_path / "cache"))
    name = f"custom-{key().digest}"
    assert store_folder(cfg, key()) == tmp_path / "cache" / "features" / name
    cfg.FEATURE_STORE.FOLDER = str(tmp_path / "mine")
    assert store_folder(cfg, key()) == tmp_path / "mine" / name


def test_budget(cfg, records, tmp_path, caplog, monkeypatch):
    store = store_of(cfg, records, tmp_path / "store")
    with caplog.at_level(logging.INFO):
        assert "more than FEATURE_STORE.MAX_SIZE (1e-09 GiB)" in budget_problem(store, limit=1e-9)
        with monkeypatch.context() as patch:
            patch.setattr("reclip_d2.features.store._free_space", lambda _: 10)
            assert "has 10" in budget_problem(store, limit=1.0)
        assert not store.folder.exists()  # a store that does not fit leaves nothing
        assert budget_problem(store, limit=1.0) == "" == budget_problem(store, limit=0)
        assert "20 images x 2 views" in caplog.text
        assert [path.name for path in store.folder.iterdir()] == ["size.json"]


def test_the_size_is_estimated_once(cfg, records, tmp_path, monkeypatch):
    """From the images' headers; the folder is named after their content."""
    assert not budget_problem(store := store_of(cfg, records, tmp_path / "store"), limit=0)
    size = store.bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Views, "largest_size", None)
        assert store_of(cfg, records, tmp_path / "store").bytes() == size == 40 * 2 * 4 * 5 * 2
    for damage in ("", "{}", '{"bytes": "x"}', '{"bytes": -1}', "[]"):
        (tmp_path / "store" / "size.json").write_text(damage)
        assert store_of(cfg, records, tmp_path / "store").bytes() == size
        assert not budget_problem(store, limit=0)  # which repairs it
        assert json.loads((tmp_path / "store" / "size.json").read_text()) == {"bytes": size}
    (tmp_path / "file").touch()
    nowhere = store_of(cfg, records, tmp_path / "file" / "store")
    nowhere.record_bytes(size)
    assert nowhere.bytes() == size


def test_parts_in_any_order(cfg, records, tmp_path):
    """40 views are three shards; a part neither computes nor waits for the others."""
    calls = []
    for index in (3, 1, 2):
        store, encoder = store_of(cfg, records, tmp_path / "store"), Encoder()
        assert not store.is_complete()
        store.make(encoder, WorkShard(index, 3))
        calls.append(encoder.calls)
    assert calls == [40 - 2 * FEWEST_VIEWS, FEWEST_VIEWS, FEWEST_VIEWS] and store.is_complete()
    assert [int(store.read(number).features[0, 0, 0]) for number in range(40)] == [k // 2 for k in range(40)]
