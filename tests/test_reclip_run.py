"""``train_net.py`` with ReCLIP: whole-image hypotheses, training, interruption, evaluation."""

import json

import pytest
import torch

from tests.helpers import datasets, isolated_cache, stopped_in_iteration
from tests.test_train_net import assert_same, metrics, run, scene, weights

__all__ = ["datasets", "isolated_cache", "scene"]
RECLIP = (
    *("MODEL.BIAS_HEAD.NAME", "ReCLIPBiasHead", "MODEL.BIAS_HEAD.SPACE_CHANNELS", "[8, 6]"),
    *("MODEL.MASK_DECODER.ENABLED", "False", "HYPOTHESIS.METHOD", "image", "HYPOTHESIS.THRESHOLD", "0.0"),
)


def test_a_stopped_run_ends_as_an_unbroken_one_and_its_number_comes_back(scene, isolated_cache, monkeypatch):
    run(scene, "unbroken", *RECLIP, "VIS_PERIOD", "2")
    (file,) = (isolated_cache / "hypotheses").glob("*.jsonl")
    assert json.loads(file.read_text().splitlines()[0])["method"] == "image"

    with stopped_in_iteration(4, monkeypatch):  # an iteration after the checkpoint is lost
        run(scene, "stopped", *RECLIP)
    run(scene, "stopped", "--resume", *RECLIP)
    assert_same(weights(scene, "unbroken"), weights(scene, "stopped"))  # the running statistics too

    early, late = weights(scene, "unbroken", "model_0000002"), weights(scene, "unbroken")
    kinds = {key.split(".")[1] for key in late}
    assert kinds == {"reference_prompt", "space_projection"} and all(key.startswith("bias_head.") for key in late)
    # A bias before a batch norm gets no gradient, and shrinks with the weight decay.
    assert not any(torch.equal(early[key], late[key]) for key in late)

    evaluated = run(scene, "unbroken", "--eval-only", "--resume", *RECLIP)["sem_seg"]
    assert evaluated["mIoU"] == metrics(scene, "unbroken")["sem_seg/mIoU"]


def test_a_checkpoint_of_the_other_bias_head_is_refused(scene, capsys):
    run(scene, "out", "SOLVER.MAX_ITER", "1")
    with pytest.raises(SystemExit):
        run(scene, "other", "--eval-only", "MODEL.WEIGHTS", str(scene / "out" / "model_final.pth"), *RECLIP)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "model_final.pth does not fit this model" in message
