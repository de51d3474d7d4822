"""The model that the judge without labels keeps (``SOLVER.JUDGE_PERIOD``)."""

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.engine import judged_training
from reclip_d2.errors import ReclipError
from tests.helpers import datasets, isolated_cache, stopped_in_iteration, watch_opened_files
from tests.test_train_net import assert_same, metrics, run, scene, weights

__all__ = ["datasets", "isolated_cache", "scene"]

STORE = ("FEATURE_STORE.VIEWS", "2", "FEATURE_STORE.KIND", "whole", "SOLVER.CHECKPOINT_PERIOD", "2")
JUDGED = (*STORE, "SOLVER.JUDGE_PERIOD", "2")


def scores(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Replace the judge's scores, in turn."""
    found = iter(values)
    monkeypatch.setattr(judged_training, "judge_score", lambda *_: next(found))


@pytest.mark.parametrize(("values", "kept"), [((1, 3, 2), "model_0000003"), ((3, 3, 2), "model_0000001")])
def test_the_best_model_is_kept(scene, monkeypatch, values, kept):
    run(scene, "plain", *STORE)
    scores(monkeypatch, *values)
    run(scene, "judged", *JUDGED)
    assert_same(weights(scene, "judged"), weights(scene, "plain", kept))
    assert "it is kept" in (scene / "judged" / "log.txt").read_text()
    assert metrics(scene, "judged")["judge/estimated_miou"] == 2


def test_the_last_model_may_be_the_best(scene, monkeypatch):
    run(scene, "plain", *STORE)
    scores(monkeypatch, 1, 2, 3)
    run(scene, "judged", *JUDGED)
    assert_same(weights(scene, "judged"), weights(scene, "plain"))


def test_a_resumed_run_keeps_the_same_model(scene, monkeypatch):
    run(scene, "plain", *STORE)
    scores(monkeypatch, 3, 2, 1)
    with stopped_in_iteration(4, monkeypatch):
        run(scene, "stopped", *JUDGED)
    run(scene, "stopped", "--resume", *JUDGED)
    assert_same(weights(scene, "stopped"), weights(scene, "plain", "model_0000001"))


def test_judging_opens_no_label(scene, monkeypatch):
    labels = scene / "train" / "annotations_detectron2"
    opened = []

    def guard(path: str) -> None:
        if path.startswith(str(labels)):
            raise AssertionError(f"the judge opens a label: {path}")
        opened.append(path)

    with watch_opened_files(guard):
        run(scene, "judged", *JUDGED)
    assert any(name.endswith(".jpg") for name in opened)
    assert 0 < metrics(scene, "judged")["judge/estimated_miou"] < 100


def test_the_judge_needs_a_store_of_whole_images():
    with pytest.raises(ReclipError, match=r"SOLVER.JUDGE_PERIOD needs a feature store of whole images"):
        load_config("", ["SOLVER.JUDGE_PERIOD", "2"])
    with pytest.raises(ReclipError, match=r"SOLVER.JUDGE_PERIOD needs the feature store, which is not made"):
        judged_training.KeepBestJudged.of(load_config("", []), torch.nn.Identity(), [])
