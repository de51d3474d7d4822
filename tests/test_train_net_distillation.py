"""``train_net.py`` distils: from a rectified checkpoint to a student that is evaluated without a CLIP."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

import reclip_d2.backbones.dense
from reclip_d2.modeling.student.inherited import HEADS
from tests.helpers import (
    EMBED_DIM,
    TINY_TEXT,
    TINY_VISION,
    datasets,
    isolated_cache,
    stopped_in_iteration,
    write_scenes,
)
from tests.test_train_net import assert_same, metrics, mistake, run, scene, weights

__all__ = ["datasets", "isolated_cache", "scene"]

SMALL = {
    "MODEL.META_ARCHITECTURE": "Distillation",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "8",
}
PLUS = {
    **SMALL,
    "MODEL.TEACHER.META_ARCHITECTURE": "MaskCLIP",
    "MODEL.STUDENT.HEAD": "query",
    "MODEL.DISTILLATION.FEATURE_WEIGHT": "0.0",
    "MODEL.DISTILLATION.TEXT_WEIGHT": "0.0",
}
RECLIP = {"MODEL.BIAS_HEAD.NAME": "ReCLIPBiasHead", "MODEL.MASK_DECODER.ENABLED": "False"}


def listed(keys: dict[str, str]) -> list[str]:
    return [part for item in keys.items() for part in item]


@pytest.fixture
def teacher(scene) -> list[str]:
    """Keys of a distillation whose teacher was trained for two iterations into ``teacher/``."""
    run(scene, "teacher", "SOLVER.MAX_ITER", "2")
    return listed({**SMALL, "MODEL.TEACHER.WEIGHTS": str(scene / "teacher" / "model_final.pth")})


def without_clip(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a CLIP is built")

    monkeypatch.setattr(reclip_d2.backbones.dense, "build_clip", refuse)
    monkeypatch.setattr(open_clip, "create_model", refuse)


# ---- whole runs -------------------------------------------------------------------------------------------------


def test_from_a_rectified_checkpoint_to_a_student_without_a_clip(scene, teacher, monkeypatch):
    run(scene, "out", *teacher, "TEST.EVAL_PERIOD", "6", "VIS_PERIOD", "3")
    last = metrics(scene, "out")
    assert last["iteration"] == 5 and {"loss_mask", "loss_feature", "loss_text"} <= set(last)
    state = weights(scene, "out")
    assert {key.split(".")[0] for key in state} == {"backbone", "feature_head", "inherited"}
    content = torch.load(scene / "out" / "model_final.pth", weights_only=True)
    assert json.loads(content["identity"])["student_head"] == "query_bias_decoder"
    # What is inherited is the teacher's, and the rest has moved.
    taught = weights(scene, "teacher")
    for key in ("conv.weight", "norm.running_mean", "norm.weight"):
        assert torch.equal(state[f"inherited.mask_decoder.{key}"], taught[f"mask_decoder.{key}"])
    early = weights(scene, "out", "model_0000002")
    assert all(torch.equal(state[key], early[key]) for key in state if key.startswith("inherited."))
    assert not any(torch.equal(state[key], early[key]) for key in state if key.startswith("feature_head."))

    without_clip(monkeypatch)
    expected = last["sem_seg/mIoU"]
    assert run(scene, "out", "--eval-only", "--resume", *teacher)["sem_seg"]["mIoU"] == expected
    keys = [*listed(SMALL), "MODEL.WEIGHTS", str(scene / "out" / "model_final.pth")]
    assert run(scene, "other", "--eval-only", *keys)["sem_seg"]["mIoU"] == expected  # names no teacher
    keys[1] = "Student"
    assert run(scene, "other", "--eval-only", *keys)["sem_seg"]["mIoU"] == expected
    keys += ["TEST.SLIDING_WINDOW.ENABLED", "True", "TEST.SLIDING_WINDOW.SIZE", "[32, 32]"]
    result = run(scene, "other", "--eval-only", *keys, "TEST.SLIDING_WINDOW.STRIDE", "[16, 16]")
    assert 0 <= result["sem_seg"]["mIoU"] <= 100


@pytest.mark.parametrize("head", HEADS[:3])
def test_heads_of_table_ix(scene, teacher, head):
    keys = [*teacher, "MODEL.STUDENT.HEAD", head, "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "2"]
    run(scene, "out", *keys)
    last = metrics(scene, "out")
    alone = run(scene, "out", "--eval-only", "--resume", *keys)["sem_seg"]["mIoU"]
    assert alone == last["sem_seg/mIoU"] and last["loss_mask"] > 0
    parts = {key.removeprefix("inherited.").split(".")[0] for key in weights(scene, "out") if "inherited" in key}
    assert ("classifier" in parts, "bias_map" in parts) == (head == "original", head == "query_bias")


def test_reclip_teaches(scene):
    run(scene, "teacher", *listed(RECLIP), "SOLVER.MAX_ITER", "2")
    keys = listed({**SMALL, **RECLIP, "MODEL.TEACHER.WEIGHTS": str(scene / "teacher" / "model_final.pth")})
    run(scene, "out", *keys, "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "2")
    assert {"inherited.class_bias", "inherited.bias_map"} <= set(weights(scene, "out"))
    alone = run(scene, "out", "--eval-only", "--resume", *keys)["sem_seg"]["mIoU"]
    assert alone == metrics(scene, "out")["sem_seg/mIoU"]


def test_maskclip_plus_needs_no_hypotheses(scene, isolated_cache):
    run(scene, "out", *listed(PLUS), "TEST.EVAL_PERIOD", "6")
    last = metrics(scene, "out")
    assert last["total_loss"] > 0 and not {"loss_feature", "loss_text"} & set(last)  # one loss is the total
    assert not (isolated_cache / "hypotheses").exists()
    assert "without hypotheses" in (scene / "out" / "log.txt").read_text()
    assert run(scene, "out", "--eval-only", "--resume", *listed(PLUS))["sem_seg"]["mIoU"] == last["sem_seg/mIoU"]


def test_masks_of_another_system(scene, tmp_path, isolated_cache, capfd):
    """A student of files: it needs a mask of each image, no hypotheses, and is evaluated without them."""
    keys = listed(PLUS | {"MODEL.TEACHER.META_ARCHITECTURE": "MaskFolder"})
    masks = tmp_path / "masks"
    keys += ["MODEL.TEACHER.MASKS.FOLDER", str(masks), "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "2"]
    images = sorted((scene / "train" / "images").iterdir())
    masks.mkdir()
    for image in images[1:]:
        Image.new("L", (8, 8), 1).save(masks / f"{image.stem}.png")
    assert "1 of 6 images have no mask" in mistake(capfd, scene, *keys)
    Image.new("L", (8, 8), 1).save(masks / f"{images[0].stem}.png")
    run(scene, "out", *keys)
    last = metrics(scene, "out")
    assert last["total_loss"] > 0 and not (isolated_cache / "hypotheses").exists()
    assert run(scene, "out", "--eval-only", "--resume", *keys)["sem_seg"]["mIoU"] == last["sem_seg/mIoU"]


def test_initial_weights_of_the_backbone(scene):
    run(scene, "first", *listed(PLUS), "SOLVER.MAX_ITER", "1")
    state = weights(scene, "first")
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    torch.save(backbone, scene / "backbone.pth")
    keys = [*listed(PLUS), "MODEL.STUDENT.WEIGHTS", str(scene / "backbone.pth"), "SOLVER.BASE_LR", "0.0"]
    run(scene, "second", *keys, "SOLVER.MAX_ITER", "1", "SOLVER.WEIGHT_DECAY", "0.0")
    for key, value in weights(scene, "second").items():
        if key.startswith("backbone.") and key.endswith("weight"):
            assert torch.equal(value, state[key]), key


# ---- repeatable, resumable, label-blind -------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [[], ["SOLVER.AMP.ENABLED", "True", "SOLVER.IMS_PER_BATCH", "4"]], ids=["usual", "amp"])
def test_resume_ends_as_an_unbroken_run(scene, teacher, monkeypatch, amp):
    keys = [*teacher, *amp, *(["SOLVER.ACCUMULATE_STEPS", "2"] if amp else [])]
    run(scene, "unbroken", *keys)

    with stopped_in_iteration(4, monkeypatch):  # an iteration after the checkpoint is lost
        run(scene, "stopped", *keys)
    assert (scene / "stopped" / "last_checkpoint").read_text() == "model_0000002.pth"
    run(scene, "stopped", "--resume", *keys)
    assert metrics(scene, "stopped")["iteration"] == 5
    assert_same(weights(scene, "unbroken"), weights(scene, "stopped"))
    momenta = [
        torch.load(scene / name / "model_final.pth", weights_only=True)["optimizer"]["state"]
        for name in ("unbroken", "stopped")
    ]
    assert momenta[0].keys() == momenta[1].keys() != set()
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"])


def test_averaged_weights_are_evaluated_saved_and_resumed(scene, teacher, monkeypatch):
    average = ["MODEL.DISTILLATION.EMA_DECAY", "0.5"]
    run(scene, "plain", *teacher)
    run(scene, "unbroken", *teacher, *average, "TEST.EVAL_PERIOD", "3")
    with stopped_in_iteration(4, monkeypatch):
        run(scene, "stopped", *teacher, *average)
    run(scene, "stopped", *teacher, *average, "--resume")
    contents = [
        torch.load(scene / name / "model_final.pth", weights_only=True) for name in ("plain", "unbroken", "stopped")
    ]
    assert_same(contents[1]["model"], contents[2]["model"])
    trained = [content["trained_student"] for content in contents[1:]]
    assert trained[0]["averaged"] == trained[1]["averaged"] == 6
    for content in trained:  # the average does not take part in the training
        assert_same(content["student"], contents[0]["model"])
    assert not torch.equal(
        contents[1]["model"]["backbone.stem.conv1.weight"], contents[0]["model"]["backbone.stem.conv1.weight"]
    )
    # Whoever reads the checkpoint gets the average, and need not know.
    keys = [*listed(SMALL), "MODEL.WEIGHTS", str(scene / "unbroken" / "model_final.pth")]
    alone = run(scene, "other", "--eval-only", *keys)["sem_seg"]["mIoU"]
    assert alone == metrics(scene, "unbroken")["sem_seg/mIoU"]


@pytest.mark.parametrize("kind", ["rectified", "MaskCLIP+"])
def test_distillation_is_blind_to_labels(scene, teacher, monkeypatch, kind):
    keys = teacher if kind == "rectified" else listed(PLUS)
    run(scene, "with_labels", *keys)
    labels = list((scene / "train" / "annotations_detectron2").iterdir())
    assert labels
    for path in labels:
        path.unlink()
    monkeypatch.setenv("RECLIP_CACHE", str(scene / "another_cache"))  # hypotheses are made again, label-blind too
    run(scene, "without_labels", *keys)
    assert_same(weights(scene, "with_labels"), weights(scene, "without_labels"))


# ---- mistakes ---------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_there(scene, capfd):
    keys = listed(SMALL)
    assert "MODEL.TEACHER.WEIGHTS is empty: train the rectification stage first" in mistake(capfd, scene, *keys)
    line = mistake(capfd, scene, *keys, "MODEL.TEACHER.WEIGHTS", str(scene / "none.pth"))
    assert f"MODEL.TEACHER.WEIGHTS {scene}/none.pth does not exist" in line
    (scene / "rubbish.pth").write_bytes(b"rubbish")
    line = mistake(capfd, scene, *keys, "MODEL.TEACHER.WEIGHTS", str(scene / "rubbish.pth"))
    assert "rubbish.pth cannot be read" in line


def test_maskclip_as_a_teacher_has_neither_weights_nor_a_calibration(scene, capfd):
    line = mistake(capfd, scene, *listed(PLUS), "MODEL.TEACHER.WEIGHTS", "some.pth")
    assert "MODEL.TEACHER.WEIGHTS is some.pth, but MaskCLIP has no weights" in line
    line = mistake(capfd, scene, *listed(PLUS), "MODEL.MASKCLIP.CALIBRATION", "class")
    assert "MODEL.MASKCLIP.CALIBRATION is for evaluation only" in line


def test_who_is_no_teacher(scene, capfd):
    for name in ("Student", "Distillation"):
        line = mistake(capfd, scene, *listed({**PLUS, "MODEL.TEACHER.META_ARCHITECTURE": name}))
        assert f"MODEL.TEACHER.META_ARCHITECTURE {name!r} cannot be a teacher" in line
    line = mistake(capfd, scene, *listed({**PLUS, "MODEL.TEACHER.META_ARCHITECTURE": "Nobody"}))
    assert "MODEL.TEACHER.META_ARCHITECTURE 'Nobody' is not registered" in line
    line = mistake(capfd, scene, *listed(PLUS), "MODEL.STUDENT.BACKBONE", "Nobody")
    assert "MODEL.STUDENT.BACKBONE 'Nobody' is not registered" in line


def test_a_teacher_of_another_class_list_clip_or_resolution(scene, teacher, capfd, datasets):
    capfd.readouterr()
    file = str(scene / "teacher" / "model_final.pth")
    records = write_scenes(scene / "other", 2, size=(36, 44), seed=1)
    datasets("reclip_test_other", records, ["sky", "tall tree", "sea", "brick wall"])
    keys = ["DATASETS.TRAIN", "('reclip_test_other',)", "DATASETS.TEST", "('reclip_test_other',)"]
    line = mistake(capfd, scene, *teacher, *keys)
    assert file in line and "another class list: class 2 is 'water' instead of 'sea'" in line

    if "reclip-test-other" not in open_clip.list_models():
        other = {"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": {**TINY_TEXT, "layers": 1}}
        (scene / "reclip-test-other.json").write_text(json.dumps(other))
        open_clip.add_model_config(scene / "reclip-test-other.json")
    line = mistake(capfd, scene, *teacher, "MODEL.CLIP.NAME", "reclip-test-other")
    assert file in line and "another clip: reclip-test-tiny instead of reclip-test-other" in line

    line = mistake(capfd, scene, *teacher, "INPUT.MIN_SIZE_TRAIN", "(48,)")
    assert file in line and "short side 32 px" in line and "instead of short side 48 px" in line
    line = mistake(capfd, scene, *teacher, "INPUT.CROP.SIZE", "[16, 16]")
    assert file in line and "24x32" in line and "16x16" in line


def test_students_and_teachers_mixed_up(scene, teacher, capfd):
    run(scene, "good", *teacher, "SOLVER.MAX_ITER", "1")
    capfd.readouterr()
    student, taught = (str(scene / folder / "model_final.pth") for folder in ("good", "teacher"))
    line = mistake(capfd, scene, *listed(SMALL), "MODEL.TEACHER.WEIGHTS", student)
    assert f"{student} is a distilled student's" in line
    for keys in (["--eval-only"], teacher):
        line = mistake(capfd, scene, *listed(SMALL), *keys, "MODEL.WEIGHTS", taught)
        assert f"{taught} is a rectified CLIP's, not a student's" in line and "MODEL.TEACHER.WEIGHTS" in line
    assert f"{student} is a distilled student's" in mistake(capfd, scene, "--eval-only", "MODEL.WEIGHTS", student)


def test_a_students_checkpoint_of_another_network_or_head(scene, teacher, capfd):
    run(scene, "good", *teacher, "SOLVER.MAX_ITER", "1")
    capfd.readouterr()
    keys = ["MODEL.WEIGHTS", str(scene / "good" / "model_final.pth")]
    for training in (["--eval-only"], []):  # the student, or the student in its distillation
        wider = mistake(capfd, scene, *training, *teacher, *keys, "MODEL.RESNETS.RES2_OUT_CHANNELS", "16")
        assert "does not fit this model" in wider and " has shape " in wider
        deeper = mistake(capfd, scene, *training, *teacher, *keys, "MODEL.RESNETS.DEPTH", "34")
        assert "does not fit this model: backbone.res2.2.conv1.weight is missing" in deeper
        head = mistake(capfd, scene, *training, *teacher, *keys, "MODEL.STUDENT.HEAD", "query")
        assert "another student_head: query_bias_decoder instead of query" in head


def test_resume_with_another_network(scene, teacher, capfd):
    run(scene, "out", *teacher, "SOLVER.MAX_ITER", "1")
    capfd.readouterr()
    keys = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "SOLVER.MAX_ITER", "2"]
    line = mistake(capfd, scene, "--resume", *teacher, *keys)
    assert "was trained with MODEL.RESNETS.RES2_OUT_CHANNELS 8 instead of 16" in line


def test_a_student_does_not_train_alone(scene, capfd):
    line = mistake(capfd, scene, *listed({**SMALL, "MODEL.META_ARCHITECTURE": "Student"}))
    assert "set MODEL.META_ARCHITECTURE Distillation" in line


def test_weights_of_the_backbone_that_are_not_there(scene, capfd):
    for source, expected in ((str(scene / "none.pth"), "does not exist"), ("torchvision://none", "torchvision")):
        line = mistake(capfd, scene, *listed(PLUS), "MODEL.STUDENT.WEIGHTS", source)
        assert "MODEL.STUDENT.WEIGHTS" in line and source in line and expected in line


def test_a_loss_that_is_not_finite_stops_the_run(scene, capfd):
    line = mistake(capfd, scene, *listed(PLUS), "SOLVER.BASE_LR", "1e38")
    assert "loss_mask is not finite: " in line and ".jpg" not in line and "lower SOLVER.BASE_LR" in line


def test_output_of_a_run_is_not_overwritten(scene, capfd):
    run(scene, "out", *listed(PLUS), "SOLVER.MAX_ITER", "1")
    capfd.readouterr()
    assert Path(scene / "out" / "model_final.pth").is_file()
    assert "--overwrite" in mistake(capfd, scene, *listed(PLUS), "SOLVER.MAX_ITER", "1")
