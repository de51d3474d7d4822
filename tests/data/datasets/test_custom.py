"""A user's images as the data set ``custom``, and ``train_net.py`` on them."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.data.class_file import parse_classes
from reclip_d2.data.classes import class_names_of
from reclip_d2.data.datasets.custom import CUSTOM, register_custom, register_images
from reclip_d2.engine import program, trainer
from reclip_d2.errors import ReclipError
from tests.helpers import config_arguments, config_files, write_scenes


@pytest.fixture(autouse=True)
def forget_custom():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        if CUSTOM in catalog.list():
            catalog.remove(CUSTOM)


@pytest.fixture
def inputs(tmp_path) -> tuple[str, str]:
    write_scenes(tmp_path / "scenes", 5, size=(96, 96))
    (tmp_path / "classes.txt").write_text("sky, heaven\nwood\nbackground: fire\n")
    return str(tmp_path / "scenes" / "images"), str(tmp_path / "classes.txt")


def config(inputs: tuple[str, str], *keys: str):
    images, classes = inputs
    return load_config(
        config_files("custom", "reclippp_rectify"),
        ["DATASETS.CUSTOM.IMAGES", images, "DATASETS.CUSTOM.CLASSES", classes, *keys],
    )


def test_records_and_metadata(inputs):
    register_custom(config(inputs))
    records = DatasetCatalog.get(CUSTOM)
    assert [record["image_id"] for record in records] == [f"{i:03d}.jpg" for i in range(5)]
    assert all(set(record) == {"file_name", "image_id"} and Path(record["file_name"]).exists() for record in records)
    assert class_names_of(CUSTOM) == [["sky", "heaven"], ["wood"], ["fire"]]
    metadata = MetadataCatalog.get(CUSTOM)
    assert metadata.stuff_classes == ["sky", "wood", "fire"] and len(metadata.stuff_colors) == 3


def test_registered_again_it_is_the_new_one(inputs, tmp_path):
    register_custom(config(inputs))
    (tmp_path / "classes.txt").write_text("road\nsnow\n")
    register_custom(config(inputs))
    assert class_names_of(CUSTOM) == [["road"], ["snow"]]
    register_images([{"file_name": "a", "image_id": "b"}], parse_classes("a\nb", "c"))
    assert DatasetCatalog.get(CUSTOM) == [{"file_name": "a", "image_id": "b"}]


def test_other_configs_are_left_alone():
    register_custom(load_config(""))
    assert CUSTOM not in DatasetCatalog.list()


@pytest.mark.parametrize("missing", [0, 1])
def test_both_keys_are_needed(inputs, missing):
    keys = list(inputs)
    keys[missing] = ""
    with pytest.raises(ReclipError, match=r"DATASETS\.CUSTOM\.CLASSES is empty"):
        register_custom(config(tuple(keys)))


def run(inputs: tuple[str, str], output: Path, *arguments: str, method: str = "reclippp_rectify"):
    flags = [a for a in arguments if a.startswith("--")]
    keys = [a for a in arguments if not a.startswith("--")]
    images, classes = inputs
    args = program.argument_parser().parse_args([
        *config_arguments("custom-reclip-embedded", method), *flags,
        "DATASETS.CUSTOM.IMAGES", images, "DATASETS.CUSTOM.CLASSES", classes, "OUTPUT_DIR", str(output),
        "MODEL.DEVICE", "cpu", "MODEL.CLIP.TEMPLATES", "photo", "HYPOTHESIS.WINDOW_RATIO", "0.5",
        "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2", *keys,
    ])  # fmt: skip
    return program.main(args)


def test_train_net_trains_and_resumes_on_own_images(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path / "whole", "SOLVER.MAX_ITER", "4")
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "5 training images" in log
    assert "DATASETS.TEST is empty: without labels there is nothing to evaluate" in log

    def stop(self: object) -> None:
        if self.iter == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        step = trainer.Trainer.run_step
        patch.setattr(trainer.Trainer, "run_step", stop)
        run(inputs, tmp_path / "broken", "SOLVER.MAX_ITER", "4")
    run(inputs, tmp_path / "broken", "--resume", "SOLVER.MAX_ITER", "4")
    weights = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in ("whole", "broken")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_a_name_that_the_text_encoder_cannot_take(inputs, tmp_path, capsys, flags):
    """Known before anything is written."""
    Path(inputs[1]).write_text("sky\n" + "b " * 80 + "\n")
    with pytest.raises(SystemExit):
        run(inputs, tmp_path / "out", *flags, "SOLVER.MAX_ITER", "1")
    err = capsys.readouterr().err
    assert f"{inputs[1]}, line 2: the name 'b b" in err and "has 80 tokens" in err
    assert not (tmp_path / "out").exists()


def test_evaluation_without_labels_is_one_line(inputs, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO):
        assert not run(inputs, tmp_path / "out", "--eval-only", method="maskclip")
    with pytest.raises(SystemExit):
        run(inputs, tmp_path / "out", "--eval-only", "DATASETS.TEST", "('custom',)", method="maskclip")
    assert "data set 'custom' has no labels to evaluate with" in capsys.readouterr().err


def test_wrong_inputs_are_one_line(inputs, tmp_path, capsys):
    for pair in ((str(tmp_path / "none"), inputs[1]), (inputs[0], str(tmp_path / "none.txt")), ("", "")):
        with pytest.raises(SystemExit):
            run(pair, tmp_path / "out")
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    Path(inputs[1]).write_text("sky\nsky\n")
    with pytest.raises(SystemExit):
        run(inputs, tmp_path / "out")
    assert "line 2" in capsys.readouterr().err
