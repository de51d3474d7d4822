"""Registered data sets under other names."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.data.datasets.custom import register_custom
from reclip_d2.data.datasets.vocabulary import SUFFIX
from reclip_d2.engine import program
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import DatasetLabels, check_no_background
from reclip_d2.workspace.export import ExportSource
from tests.helpers import config_arguments, config_files, write_embedded_scenes


@pytest.fixture(autouse=True)
def forget_renamed():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in [name for name in catalog.list() if name.endswith(SUFFIX)]:
            catalog.remove(name)


OWN = list(MetadataCatalog.get("embedded_dev").stuff_classes)


@pytest.fixture
def world(tmp_path, datasets) -> str:
    """Four scenes of the embedded world."""
    return datasets("small_val", write_embedded_scenes(tmp_path, 4), OWN)


def vocabulary(tmp_path, text: str) -> str:
    (tmp_path / "names.txt").write_text(text)
    return str(tmp_path / "names.txt")


def config(world: str, file: str, *keys: str):
    names = ["DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{world}',)", "DATASETS.VOCABULARY", file]
    return load_config(config_files("embedded", "maskclip"), [*names, *keys])


def test_names_change_and_labels_stay(world, tmp_path):
    cfg = config(
        world,
        vocabulary(
            tmp_path, "\n".join(["heaven, air; moon", "background: face", *(f"new {name}" for name in OWN[1:])])
        ),
    )
    register_custom(cfg)
    assert cfg.DATASETS.TEST == ("small_val_vocabulary",)
    new = [[f"new {name}"] for name in OWN[1:]]
    assert class_names_from_config(cfg) == [["heaven", "air"], *new, ["moon"], ["face"]]
    assert DatasetCatalog.get("small_val_vocabulary") == DatasetCatalog.get(world)
    labels = DatasetLabels("small_val_vocabulary")
    assert labels.class_names == [*OWN, "background"]
    assert labels.predicted_ids(np.arange(14)).tolist() == [*range(12), 0, 12]
    record = DatasetCatalog.get(world)[0]
    np.testing.assert_array_equal(labels.read(record, (96, 96)), DatasetLabels(world).read(record, (96, 96)))
    with pytest.raises(ReclipError, match="remove semicolons and the background: line"):
        check_no_background("small_val_vocabulary", "this report")
    register_custom(cfg)  # a config that a run has written
    assert cfg.DATASETS.TEST == ("small_val_vocabulary",)


def test_other_number_of_classes(world, tmp_path):
    with pytest.raises(ReclipError, match=r"names\.txt has 2 classes, but small_val has 12: .*: sky, lake, leaves"):
        register_custom(config(world, vocabulary(tmp_path, "a\nb; c\n")))
    with pytest.raises(ReclipError, match="none.txt does not exist: check DATASETS.VOCABULARY"):
        register_custom(config(world, str(tmp_path / "none.txt")))


def test_not_for_own_images(world, tmp_path):
    file = vocabulary(tmp_path, "a\nb\n")
    (tmp_path / "labels").mkdir()
    keys = ["DATASETS.CUSTOM.IMAGES", str(tmp_path), "DATASETS.CUSTOM.CLASSES", file]
    with pytest.raises(ReclipError, match="custom"):
        register_custom(config("custom", file, *keys))


def test_evaluation_under_other_names(tmp_path, world):
    """The same names give the same scores; a background name only takes pixels away."""
    keys = ["DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{world}',)", "OUTPUT_DIR", str(tmp_path / "out")]
    results = []
    for extra in (None, "", "\nbackground: grass"):
        names = [] if extra is None else ["DATASETS.VOCABULARY", vocabulary(tmp_path, "\n".join(OWN) + extra)]
        arguments = [*config_arguments("embedded", "maskclip"), "--eval-only", *keys, *names]
        results.append(program.main(program.argument_parser().parse_args(arguments))["sem_seg"])
    own, same, background = results
    np.testing.assert_equal({key: same[key] for key in own}, dict(own))  # with NaN for classes that do not occur
    assert np.isnan(background["IoU-background"])
    assert background["IoU-lawn"] < own["IoU-lawn"]  # some of it is grass
    found = [f"ACC-{name}" for name in OWN if not np.isnan(own[f"ACC-{name}"])]
    assert len(found) >= 8 and all(background[key] <= own[key] for key in found)


def test_exported_labels_are_those_of_the_classes(tmp_path):
    file = vocabulary(tmp_path, "\n".join([f"{OWN[0]}; moon", *OWN[1:], "background: face"]))
    keys = ["DATASETS.VOCABULARY", file]
    source = ExportSource.of_config(config_files("embedded", "maskclip"), opts=keys)
    assert source.label_ids == [*range(12), 0, 255] and list(source.classes.names) == OWN
    kept = ExportSource.of_config(config_files("embedded", "maskclip"), opts=keys, keep_background=True)
    assert kept.label_ids == [*range(12), 0, 12] and kept.classes.background == 12
