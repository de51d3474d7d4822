"""The class list of a data set."""

import pytest

from reclip_d2.config import load_config
from reclip_d2.data.classes import check_labelled, check_registered, class_names_from_config, class_names_of
from reclip_d2.data.datasets.embedded import register_embedded  # noqa: F401  (registers the embedded data set)
from reclip_d2.errors import ReclipError
from reclip_d2.toy.worlds import WORLDS


def test_names_and_synonyms(datasets):
    datasets("reclip_test_a", [], ["sky", "tree"])
    assert class_names_of("reclip_test_a") == [["sky"], ["tree"]]
    datasets("reclip_test_b", [], ["sky", "tree"], stuff_class_synonyms=[["sky", "heaven"], ["tree"]])
    assert class_names_of("reclip_test_b") == [["sky", "heaven"], ["tree"]]


def test_unregistered():
    with pytest.raises(
        ReclipError, match=r"data set 'nothing_train' is not registered: choose one of .*embedded_train"
    ):
        check_registered("nothing_train")
    with pytest.raises(ReclipError, match="'nothing_train' is not registered"):
        class_names_of("nothing_train")


def test_without_labels(datasets):
    labelled = {"file_name": "a.jpg", "sem_seg_file_name": "a.png"}
    datasets("reclip_test_a", [labelled], ["sky"])
    check_labelled("reclip_test_a")
    datasets("reclip_test_b", [labelled, {"file_name": "b.jpg"}], ["sky"])
    with pytest.raises(ReclipError, match="'reclip_test_b' has no labels"):
        check_labelled("reclip_test_b")


def test_from_the_config(datasets):
    datasets("reclip_test_a", [], ["sky", "tree"])
    datasets("reclip_test_b", [], ["sky", "tree"])
    datasets("reclip_test_c", [], ["sky", "oak"])
    cfg = load_config("")
    with pytest.raises(ReclipError, match="DATASETS.TRAIN and DATASETS.TEST are empty"):
        class_names_from_config(cfg)
    cfg.DATASETS.TEST = ("reclip_test_a",)
    assert class_names_from_config(cfg) == [["sky"], ["tree"]]
    cfg.DATASETS.TRAIN = ("reclip_test_b",)
    assert class_names_from_config(cfg) == [["sky"], ["tree"]]
    cfg.DATASETS.TRAIN = ("reclip_test_c",)
    with pytest.raises(ReclipError, match="'reclip_test_c' and 'reclip_test_a' have different class lists"):
        class_names_from_config(cfg)
    cfg.DATASETS.TRAIN = ("reclip_test_d",)
    with pytest.raises(ReclipError, match="'reclip_test_d' is not registered"):
        class_names_from_config(cfg)


def test_embedded_training_records_carry_no_labels(monkeypatch, tmp_path):
    """Without making the data set: only the list of its files."""
    from reclip_d2.data.datasets import embedded

    monkeypatch.setattr(embedded, "ensure_dataset", lambda root, world: root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for world in WORLDS.values():
        assert embedded.embedded_root(world) == tmp_path / world.name
        assert not any("sem_seg_file_name" in record for record in embedded.load_embedded(world, "train", False))
        assert all("sem_seg_file_name" in record for record in embedded.load_embedded(world, "val", True))
    assert len(class_names_of("embedded_train")) == 12
    assert class_names_of("embedded_train") == class_names_of("embedded_val") == class_names_of("embedded_dev")
