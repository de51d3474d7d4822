"""Training records: hypotheses in, labels out."""

import hashlib
import json
import logging
import types
from pathlib import Path

import pytest

from reclip_d2.backbones.settings import pixel_statistics
from reclip_d2.data.dataset_mapper import LABEL_KEYS
from reclip_d2.errors import ReclipError
from reclip_d2.features import shards
from reclip_d2.features.store import images_digest
from reclip_d2.hypothesis import generate
from reclip_d2.hypothesis.training_records import (
    build_training_records,
    hypothesis_header,
    hypothesis_path,
    make_hypothesis_part,
    unlabelled_records,
)
from reclip_d2.utils.work_shard import WorkShard
from tests.helpers import hypothesis_config, isolated_cache, write_scenes

__all__ = ["isolated_cache"]

NAMES = ["sky", "tall tree", "water", "brick wall"]


@pytest.fixture
def cfg(tmp_path, datasets, isolated_cache):
    datasets("reclip_test_train", write_scenes(tmp_path / "scenes", 3), NAMES)
    cfg = hypothesis_config(tmp_path)
    cfg.DATASETS.TRAIN = ("reclip_test_train",)
    return cfg


def test_no_label_entry_is_left(tmp_path, datasets):
    records = write_scenes(tmp_path / "scenes", 2)
    for record in records:
        record.update(annotations=[{}], segments_info=[{}], pan_seg_file_name="p.png", label_file_name="l.png")
    datasets("reclip_test_train", records, NAMES)
    got = unlabelled_records(["reclip_test_train"])
    assert len(got) == 2
    assert not any(key in record for record in got for key in LABEL_KEYS)
    assert all("annotations" in record for record in records)  # the data set's own records are untouched


def test_the_file_name_is_the_default_id(datasets):
    datasets("reclip_test_train", [{"file_name": "a.jpg"}, {"file_name": "b.jpg", "image_id": 7}], NAMES)
    assert [record["image_id"] for record in unlabelled_records(("reclip_test_train",))] == ["a.jpg", 7]


def test_no_images_and_no_data_set(datasets):
    datasets("reclip_test_empty", [], NAMES)
    with pytest.raises(ReclipError, match="no training images in reclip_test_empty"):
        unlabelled_records(["reclip_test_empty"])
    with pytest.raises(ReclipError, match="no training images in DATASETS.TRAIN"):
        unlabelled_records([])
    with pytest.raises(ReclipError, match="'reclip_test_none' is not registered"):
        unlabelled_records(["reclip_test_none"])


def test_two_images_of_one_id(datasets):
    datasets("reclip_test_a", [{"file_name": "a/1.jpg", "image_id": "1"}], NAMES)
    datasets("reclip_test_b", [{"file_name": "b/1.jpg", "image_id": "1"}], NAMES)
    with pytest.raises(ReclipError, match="id '1'"):
        unlabelled_records(["reclip_test_a", "reclip_test_b"])


def test_hypotheses_are_made_once_and_attached(cfg, isolated_cache, monkeypatch):
    records = build_training_records(cfg)
    assert len(records) == 3
    for record in records:
        assert record["hypothesis"] and set(record["hypothesis"]) <= set(range(4))
        assert not any(key in record for key in LABEL_KEYS)
    files = list((isolated_cache / "hypotheses").glob("[!.]*"))
    assert len(files) == 1 and files[0].name.startswith("reclip_test_train-crops-")
    monkeypatch.setattr(generate, "generate_hypotheses", None)  # not needed again
    assert build_training_records(cfg) == records


def test_calibrated_and_whole_image_hypotheses(cfg):
    for keys in (["HYPOTHESIS.CALIBRATED", "True"], ["HYPOTHESIS.METHOD", "image", "HYPOTHESIS.THRESHOLD", "-1.0"]):
        cfg.merge_from_list(keys)
        assert all(record["hypothesis"] for record in build_training_records(cfg))
    assert build_training_records(cfg)[0]["hypothesis"] == [0, 1, 2, 3]  # every cosine is above -1


@pytest.mark.parametrize("method", ["crops", "image"])
def test_classes_per_image_take_the_place_of_the_threshold(cfg, method, isolated_cache, caplog):
    cfg.HYPOTHESIS.METHOD = method
    cfg.HYPOTHESIS.THRESHOLD = 0.9
    cfg.HYPOTHESIS.CLASSES_PER_IMAGE = 2.0
    cfg.HYPOTHESIS.CROP_AWARE = method == "crops"
    with caplog.at_level(logging.INFO, "reclip_d2"):
        records = build_training_records(cfg)
    assert "HYPOTHESIS.CLASSES_PER_IMAGE 2: the threshold t is" in caplog.text
    # By a search over what the file holds.
    (file,) = (isolated_cache / "hypotheses").glob("[!.]*")
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    scores = [
        line["scores"] if method == "image" else [line["top1"].count(k) / len(line["top1"]) for k in range(4)]
        for line in lines
    ]

    def hypotheses(t: float) -> list[list[int]]:
        return [[k for k, s in enumerate(row) if s > t] or [row.index(max(row))] for row in scores]

    floor = -1.0 if method == "image" else 0.0
    means = {t: sum(map(len, hypotheses(t))) / 3 for t in (floor, *sum(scores, [])) if t >= floor}
    nearest = min(abs(mean - 2) for mean in means.values())
    t = max(t for t, mean in means.items() if abs(mean - 2) == pytest.approx(nearest))
    assert [record["hypothesis"] for record in records] == hypotheses(t)
    if method == "crops":
        (window_threshold,) = {record["crop_hypothesis"].threshold for record in records}
        assert hypotheses(window_threshold) == hypotheses(t)
    # The file is valid for any number of classes: nothing is recomputed, and the result is the same.
    assert build_training_records(cfg) == records
    cfg.HYPOTHESIS.CLASSES_PER_IMAGE = 1.0
    assert all(len(record["hypothesis"]) == 1 for record in build_training_records(cfg))
    assert len(list((isolated_cache / "hypotheses").glob("[!.]*"))) == 1


def test_more_classes_an_image_than_there_are(cfg, isolated_cache):
    cfg.HYPOTHESIS.CLASSES_PER_IMAGE = 4.5
    with pytest.raises(ReclipError, match="CLASSES_PER_IMAGE is 4.5, but there are 4 classes"):
        build_training_records(cfg)
    assert not (isolated_cache / "hypotheses").exists()


def test_ids_that_are_numbers_survive_the_file(cfg, tmp_path, datasets):
    records = write_scenes(tmp_path / "other", 2, seed=1)
    for index, record in enumerate(records):
        record["image_id"] = index
    datasets("reclip_test_numbers", records, NAMES)
    cfg.DATASETS.TRAIN = ("reclip_test_numbers",)
    first = build_training_records(cfg)
    assert build_training_records(cfg) == first


def test_a_named_file_is_used(cfg, tmp_path):
    cfg.HYPOTHESIS.FILE = str(tmp_path / "mine" / "h.jsonl")
    build_training_records(cfg)
    assert Path(cfg.HYPOTHESIS.FILE).is_file()
    cfg.MODEL.CLIP.AUTOCAST = "bfloat16"
    build_training_records(cfg)  # made on another machine
    cfg.HYPOTHESIS.WINDOW_RATIO = 0.25
    with pytest.raises(ReclipError, match="made with another window_ratio 0.5 instead of 0.25"):
        build_training_records(cfg)


def test_the_file_of_the_cache_changes_with_all_that_it_depends_on(cfg, tmp_path, datasets):
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    images = images_digest(records)

    def path(fingerprint: str = "f", images: str = images, **keys) -> Path:
        other = cfg.clone()
        other.merge_from_list([part for key, value in keys.items() for part in (key.replace("__", "."), value)])
        backbone = types.SimpleNamespace(
            name=other.MODEL.CLIP.NAME, fingerprint=fingerprint, pixel_statistics=pixel_statistics(other)
        )
        return hypothesis_path(other, hypothesis_header(other, backbone, images))

    datasets("reclip_test_names", records, ["sky", "oak", "water", "brick wall"])
    paths = [
        path(),
        path("g"),
        path(MODEL__CLIP__NAME="ViT-B-32"),
        path(MODEL__CLIP__TEMPLATES="imagenet"),
        path(HYPOTHESIS__METHOD="image"),
        path(HYPOTHESIS__WINDOW_RATIO=0.25),
        path(MODEL__PIXEL_MEAN=[1.0, 2.0, 3.0]),
        path(MODEL__PIXEL_STD=[1.0, 2.0, 3.0]),
        path(images="others"),
        path(MODEL__CLIP__AUTOCAST="bfloat16"),
        path(DATASETS__TRAIN=("reclip_test_names",)),
    ]
    assert len(set(paths)) == len(paths)
    assert path(HYPOTHESIS__THRESHOLD=0.5) == path(HYPOTHESIS__CALIBRATED=True) == paths[0]
    assert path(MODEL__CLIP__AUTOCAST="float32") == paths[0]  # what "auto" is on a CPU


def test_the_images_are_told_by_their_content(cfg, tmp_path):
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    first = images_digest(records)
    assert images_digest(records[:2]) != first
    assert images_digest(records[::-1]) != first
    file = Path(records[0]["file_name"])
    content = file.read_bytes()
    moved = [{**records[0], "file_name": str(file.rename(tmp_path / "elsewhere.jpg"))}, *records[1:]]
    assert images_digest(moved) == first  # the place does not matter
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the same size
    assert images_digest(records) != first


def test_a_changed_image_of_the_same_size_makes_new_hypotheses(cfg, tmp_path):
    cfg.HYPOTHESIS.FILE = str(tmp_path / "h.jsonl")
    records = build_training_records(cfg)
    file = Path(records[0]["file_name"])
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ReclipError, match="was made with another version of the images: remove it"):
        build_training_records(cfg)


def test_the_file_of_an_earlier_version_is_named(cfg, isolated_cache, caplog):
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    build_training_records(cfg)
    path = next(isolated_cache.glob("hypotheses/*.jsonl"))
    head = json.loads(path.read_text().splitlines()[0])
    fields = {key: head[key] for key in head if key not in ("format", "images", "pixel_statistics")}
    files = [(r["image_id"], r["file_name"], Path(r["file_name"]).stat().st_size) for r in records]
    digest = hashlib.sha256(json.dumps([fields, files]).encode()).hexdigest()[:16]
    legacy = path.rename(path.with_name(f"{fields['dataset']}-crops-{digest}.jsonl"))
    with caplog.at_level(logging.WARNING):
        build_training_records(cfg)
    assert f"{legacy} was made by an earlier version" in caplog.text
    # If named, it is used: what it does not record is not compared.
    lines = legacy.read_text().splitlines()
    legacy.write_text("\n".join([json.dumps({"format": head["format"], **fields}), *lines[1:]]))
    cfg.HYPOTHESIS.FILE = str(legacy)
    assert build_training_records(cfg)


def test_missing_image_folder_is_one_line(cfg, tmp_path):
    (tmp_path / "scenes" / "images").rename(tmp_path / "moved")
    with pytest.raises(ReclipError, match=r"images/000\.jpg does not exist"):
        build_training_records(cfg)


@pytest.mark.parametrize("method", ["crops", "image", pytest.param("dense", marks=pytest.mark.slow)])
def test_parts_are_what_the_file_is_made_from(cfg, method, tmp_path, isolated_cache, monkeypatch):
    cfg.HYPOTHESIS.METHOD = method
    cfg.HYPOTHESIS.FILE = str(tmp_path / "whole.jsonl")
    build_training_records(cfg)
    monkeypatch.setattr(generate.ScoreBlocks.__init__, "__defaults__", (1,))
    monkeypatch.setattr(shards, "FEWEST_VIEWS", 1)
    cfg.HYPOTHESIS.FILE = str(tmp_path / "parts.jsonl")
    cfg.FEATURE_STORE.FOLDER = str(tmp_path / "features")
    assert [make_hypothesis_part(cfg, WorkShard(index, 2)) for index in (2, 1)] == [False, True]
    assert not Path(cfg.HYPOTHESIS.FILE).exists()
    for name in ("_window_arrays", "_image_arrays"):
        monkeypatch.setattr(generate, name, None)  # not needed again
    monkeypatch.setattr("reclip_d2.features.store.FeatureStore._encode", None)
    build_training_records(cfg)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert make_hypothesis_part(cfg, WorkShard(2, 2))  # the file exists
    cfg.HYPOTHESIS.METHOD = "imported"
    cfg.HYPOTHESIS.FILE = str(tmp_path / "nothing.jsonl")
    with pytest.raises(ReclipError, match="import_public_hypotheses"):
        make_hypothesis_part(cfg, WorkShard(1, 2))
