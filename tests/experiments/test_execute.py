"""Real runs on a data set of a few files: the numbers equal those of ``train_net.py``, also after an interruption."""

import json

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.engine import trainer
from reclip_d2.experiments import execute
from reclip_d2.experiments.plan import Job
from tests.helpers import datasets, isolated_cache
from tests.test_train_net import assert_same, metrics, run, scene, weights

__all__ = ["datasets", "isolated_cache", "scene"]


def job(scene, output, kind="train", *keys):
    return Job(kind, (str(scene / "config.yaml"),), (*keys, "SEED", 0, "OUTPUT_DIR", str(scene / output)))


def test_training_and_evaluation_are_those_of_train_net(scene):
    run(scene, "by_hand", "TEST.EVAL_PERIOD", "3", "TEST.BIAS.ENABLED", "True")
    result = execute.perform(job(scene, "suite", "train", "TEST.BIAS.ENABLED", True))
    assert_same(weights(scene, "suite"), weights(scene, "by_hand"))
    assert result["metrics"]["mIoU"] == metrics(scene, "by_hand")["sem_seg/mIoU"]
    assert set(result["metrics"]["IoU"]) == {"sky", "tall tree", "water", "brick wall"}
    score = metrics(scene, "by_hand")["class_preference/score"]
    assert result["metrics"]["class_preference"]["score"] == score
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["training"]["iterations"] == 6 and result["training"]["first_iteration"] == 0
    assert 0 < result["training"]["total_loss"] == metrics(scene, "by_hand")["total_loss"]
    assert result["dataset"] == "reclip_test_val" and result["supervision"] == "none"
    assert result["versions"]["torch"] == torch.__version__ and "CPU cores" in result["machine"]
    # The only evaluation is the one at the end, and it leaves nothing in the training's metrics.
    assert "mIoU" not in (scene / "suite" / "metrics.json").read_text()
    assert (scene / "suite" / "config.yaml").exists() and "Starting training" in (
        scene / "suite" / "log.txt"
    ).read_text()


def test_a_killed_run_ends_as_an_unbroken_one(scene, monkeypatch):
    unbroken = execute.perform(job(scene, "unbroken"))

    class Killed(BaseException):
        pass

    run_step = trainer.Trainer.run_step

    def die(self):
        if self.iter == 4:  # after the checkpoint of the third iteration
            raise Killed
        run_step(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Trainer, "run_step", die)
        execute.perform(job(scene, "killed"))
    result = execute.perform(job(scene, "killed"))
    assert_same(weights(scene, "killed"), weights(scene, "unbroken"))
    assert result["metrics"] == unbroken["metrics"]
    assert result["training"]["first_iteration"] == 3

    # Killed between training and evaluation: only the evaluation is left.
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run_step", None)
        again = execute.perform(job(scene, "killed"))
    assert again["metrics"] == unbroken["metrics"] and again["training"]["first_iteration"] == 6


def test_what_needs_no_training(scene):
    keys = ("MODEL.META_ARCHITECTURE", "MaskCLIP", "MODEL.MASKCLIP.CALIBRATION", "class")
    result = execute.perform(job(scene, "suite", "evaluate", *keys))
    expected = run(scene, "by_hand", "--eval-only", *keys)["sem_seg"]["mIoU"]
    assert result["metrics"]["mIoU"] == expected and result["training"] is None


def test_a_checkpoint_under_other_keys_with_a_bank_of_its_own(scene):
    execute.perform(job(scene, "model", "train"))
    keys = ("MODEL.WEIGHTS", str(scene / "model" / "model_final.pth"), "TEST.REFINE", ["flip", "bank"])
    result = execute.perform(job(scene, "refined", "evaluate", *keys))
    bank = scene / "refined" / execute.BANK
    by_hand = run(
        scene, "by_hand", "--eval-only", *keys[:2], "TEST.REFINE", "['flip', 'bank']", "TEST.BANK.FILE", str(bank)
    )
    assert result["metrics"]["mIoU"] == by_hand["sem_seg"]["mIoU"] and result["training"] is None
    plain = execute.perform(job(scene, "plain", "evaluate", *keys[:2]))
    assert plain["metrics"] != result["metrics"] and not (scene / "plain" / execute.BANK).exists()


def test_logging_is_as_before(scene):
    import logging

    before = [list(logging.getLogger(name).handlers) for name in ("detectron2", "fvcore", "reclip_d2")]
    execute.perform(job(scene, "suite", "train", "SOLVER.MAX_ITER", 1))
    assert [list(logging.getLogger(name).handlers) for name in ("detectron2", "fvcore", "reclip_d2")] == before


def test_training_for_a_program_that_goes_on_with_the_model(scene):
    """As the demo does."""
    cfg = load_config(str(scene / "config.yaml"), ["OUTPUT_DIR", str(scene / "out")])
    trained = execute.train(cfg)
    assert not trained.model.training and trained.first_iteration == 0 and trained.seconds > 0
    evaluated = execute.evaluate(cfg, trained.model)
    assert evaluated.model is trained.model
    assert set(evaluated.scores) == {"mIoU", "IoU"}  # TEST.BIAS is off


def test_a_cut_line_of_the_metrics_is_passed_over(scene):
    job_of = job(scene, "out")
    result = execute.perform(job_of)
    path = scene / "out/metrics.json"
    path.write_text('{"iteration": 1, "total_lo{"iteration": 2, "total_loss": 9.0}\n' + path.read_text())
    assert execute.perform(job_of)["training"]["total_loss"] == result["training"]["total_loss"]
