"""``TEST.BIAS`` from the config to the results of ``train_net.py``'s evaluator."""

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.engine.trainer import Trainer
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.bias import build_bias_evaluators
from tests.helpers import write_scenes


@pytest.fixture
def records(tmp_path, datasets) -> list[dict]:
    records = write_scenes(tmp_path / "val", 2)
    datasets("reclip_test_bias", records, ["a", "b", "c", "d"])
    return records


def evaluate(records: list[dict], *keys: str) -> dict:
    """Results of a prediction that is the label."""
    evaluator = Trainer.build_evaluator(load_config("", keys), "reclip_test_bias")
    evaluator.reset()
    for record in records:
        labels = torch.from_numpy(np.asarray(Image.open(record["sem_seg_file_name"])).astype(np.int64))
        evaluator.process([record], [{"sem_seg": labels}])
    return evaluator.evaluate()


def test_off_by_default(records):
    assert build_bias_evaluators(load_config(""), "reclip_test_bias") == []
    assert set(evaluate(records)) == {"sem_seg"}


def test_on_by_one_key(records, tmp_path):
    results = evaluate(records, "TEST.BIAS.ENABLED", "True", "OUTPUT_DIR", str(tmp_path / "out"))
    assert results["sem_seg"]["mIoU"] == 100 and results["class_preference"]["score"] == 1
    assert results["space_preference"]["IoU-0-40px"] == 100
    written = {path.name for path in (tmp_path / "out" / "inference").iterdir()}
    assert written == {"reclip_test_bias_class_preference.json", "reclip_test_bias_space_preference.json"}


def test_keys_reach_the_evaluator():
    keys = ("BIN_WIDTH", "8", "MIN_OBJECT_AREA", "3", "MIN_BIN_OBJECTS", "5", "ENABLED", "True")
    opts = [f"TEST.BIAS.{key}" if i % 2 == 0 else key for i, key in enumerate(keys)]
    _, space = build_bias_evaluators(load_config("", opts), "embedded_val")
    assert (space.bin_width, space.min_object_area, space.min_bin_objects) == (8, 3, 5)


@pytest.mark.parametrize("key", ["BIN_WIDTH", "MIN_OBJECT_AREA", "MIN_BIN_OBJECTS"])
def test_values_must_be_above_0(key):
    with pytest.raises(ReclipError, match=rf"TEST\.BIAS\.{key} is 0; it must be"):
        load_config("", [f"TEST.BIAS.{key}", "0"])
