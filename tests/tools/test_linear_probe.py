"""``tools/linear_probe.py`` from a trained model to results that are marked as supervised."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.engine import trainer
from reclip_d2.engine.program import argument_parser
from reclip_d2.evaluation.labelled_views import labelled_views
from reclip_d2.evaluation.linear_probe import weights_digest
from tests.helpers import datasets, isolated_cache, make_maskclip, write_scenes
from tests.test_train_net import assert_same, error_line, scene
from tests.test_train_net import run as train

__all__ = ["datasets", "isolated_cache", "scene"]

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("linear_probe_program", ROOT / "tools" / "linear_probe.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

MASKCLIP = ("MODEL.META_ARCHITECTURE", "MaskCLIP")
# The scene's training split is registered with its labels.
SHORT = (
    *("LINEAR_PROBE.DATASETS", "('reclip_test_train',)", "LINEAR_PROBE.MAX_ITER", "6"),
    *("LINEAR_PROBE.IMS_PER_BATCH", "2", "LINEAR_PROBE.BASE_LR", "0.1"),
)


def probe(scene: Path, output: str, *arguments: str) -> dict | None:
    """The program on a run's folder; arguments that begin with -- come first."""
    flags = [a for a in arguments if a.startswith("--")]
    keys = [a for a in arguments if not a.startswith("--")]
    args = argument_parser().parse_args(
        ["--config-file", str(scene / "config.yaml"), *flags, "OUTPUT_DIR", str(scene / output), *SHORT, *keys]
    )
    return program.main(args)


def mistake(capfd, scene: Path, output: str, *arguments: str) -> str:
    return error_line(capfd, lambda: probe(scene, output, *arguments))


def report_of(scene: Path, output: str) -> dict:
    return json.loads((scene / output / "linear_probe" / "linear_probe.json").read_text())


def classifier_of(scene: Path, output: str) -> dict[str, torch.Tensor]:
    return torch.load(scene / output / "linear_probe" / "model_final.pth", weights_only=True)["model"]


def test_maskclip(scene, capfd):
    results = probe(scene, "out", *MASKCLIP)
    report = report_of(scene, "out")
    assert report["supervision"] == "labels (linear probe)"
    assert report["trained_on_labels_of"] == ["reclip_test_train"]
    assert report["probed"]["model"] == "MaskCLIP" and report["probed"]["embedding_width"] == 24
    assert report["settings"] == {
        "iterations": 6, "images_per_batch": 2, "base_lr": 0.1, "weight_decay": 0.0, "batch_norm": True, "seed": 0,
    }  # fmt: skip
    scores = report["results"]["reclip_test_val"]
    assert scores["mIoU"] == results["reclip_test_val"]["sem_seg"]["mIoU"] and 0 <= scores["mIoU"] <= 100
    assert set(scores["IoU"]) == {"sky", "tall tree", "water", "brick wall"}
    assert "trained with labels: mIoU" in capfd.readouterr().out
    # No other file looks like the result of an unsupervised model.
    assert {path.name for path in (scene / "out").iterdir()} == {"linear_probe"}
    assert "mIoU" not in (scene / "out" / "linear_probe" / "metrics.json").read_text()


def test_a_rectified_model(scene):
    """Its last checkpoint is probed, and not changed."""
    train(scene, "out", "SOLVER.MAX_ITER", "2")
    file = scene / "out" / "model_final.pth"
    content = file.read_bytes()
    probe(scene, "out")
    assert file.read_bytes() == content
    report = report_of(scene, "out")
    assert report["probed"]["weights"] == str(file) and report["probed"]["embedding_width"] == 24 + 4
    model = trainer.build_evaluation_model(
        load_config(str(scene / "config.yaml"), ["MODEL.WEIGHTS", str(file)]), resume=False
    )
    assert report["probed"]["probed model"] == weights_digest(model)
    probe(scene, "elsewhere", "LINEAR_PROBE.WEIGHTS", str(file))
    assert_same(classifier_of(scene, "elsewhere"), classifier_of(scene, "out"))
    assert report_of(scene, "elsewhere")["results"] == report["results"]


def test_the_learning_is_that_of_the_keys(scene):
    """By hand: the first step of the poly schedule on the first batch, from weights of zero."""
    probe(scene, "out", *MASKCLIP, "LINEAR_PROBE.MAX_ITER", "1", "SOLVER.BASE_LR", "7.0", "SOLVER.MAX_ITER", "9")
    found = classifier_of(scene, "out")
    assert found["norm.num_batches_tracked"] == 1
    # The gradient of the bias is, class by class, 1/4 (the soft-max) less the class's share of the pixels.
    shares = found["classifier.bias"] / 0.1 + 0.25
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    assert shares.min() > -1e-5 and shares.max() > 0.2


def test_resume_ends_as_an_unbroken_run(scene, monkeypatch):
    keys = [*MASKCLIP, "SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.NUM_WORKERS", "1"]
    probe(scene, "unbroken", *keys)

    class Stopped(BaseException):
        pass

    run_step = program.ProbeTrainer.run_step

    def stop(self):
        if self.iter == 3:
            raise Stopped
        run_step(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(program.ProbeTrainer, "run_step", stop)
        probe(scene, "stopped", *keys)
    assert not (scene / "stopped" / "linear_probe" / "linear_probe.json").exists()
    probe(scene, "stopped", "--resume", *keys)
    assert_same(classifier_of(scene, "stopped"), classifier_of(scene, "unbroken"))
    assert report_of(scene, "stopped")["results"] == report_of(scene, "unbroken")["results"]


def test_an_existing_probe(scene, capfd):
    probe(scene, "out", *MASKCLIP)
    before, report = classifier_of(scene, "out"), report_of(scene, "out")
    capfd.readouterr()
    line = mistake(capfd, scene, "out", *MASKCLIP, "LINEAR_PROBE.BASE_LR", "0.2")
    assert f"{scene}/out/linear_probe contains a linear probe: add --resume, --overwrite" in line
    assert_same(classifier_of(scene, "out"), before)
    probe(scene, "out", "--eval-only", *MASKCLIP)
    assert_same(classifier_of(scene, "out"), before)
    assert report_of(scene, "out")["results"] == report["results"]
    probe(scene, "out", "--overwrite", *MASKCLIP, "LINEAR_PROBE.BASE_LR", "0.2")
    assert not torch.equal(classifier_of(scene, "out")["classifier.weight"], before["classifier.weight"])
    assert report_of(scene, "out")["settings"]["base_lr"] == 0.2


def test_mixed_precision_of_the_config_does_not_reach_the_probe(scene):
    probe(scene, "plain", *MASKCLIP)
    probe(scene, "mixed", *MASKCLIP, "SOLVER.AMP.ENABLED", "True")
    assert_same(classifier_of(scene, "plain"), classifier_of(scene, "mixed"))


def test_several_data_sets(scene, datasets):
    names = ["sky", "tall tree", "water", "brick wall"]
    datasets("reclip_test_more", write_scenes(scene / "more", 2, seed=5), names)
    more = ["DATASETS.TEST", "('reclip_test_val','reclip_test_more')"]
    results = probe(scene, "out", *MASKCLIP, *more, "LINEAR_PROBE.DATASETS", "('reclip_test_train','reclip_test_more')")
    assert set(results) == set(report_of(scene, "out")["results"]) == {"reclip_test_val", "reclip_test_more"}


def test_mistakes(scene, capfd, datasets):
    assert "contains no trained model to probe: run train_net.py" in mistake(capfd, scene, "out")
    assert not (scene / "out").exists()
    assert "none.pth does not exist" in mistake(capfd, scene, "out", "LINEAR_PROBE.WEIGHTS", str(scene / "none.pth"))
    assert "contains no linear probe to evaluate" in mistake(capfd, scene, "out", "--eval-only", *MASKCLIP)
    unlabelled = [{"file_name": str(scene / "train" / "images" / "000.jpg")}]
    names = ["sky", "tall tree", "water", "brick wall"]
    datasets("reclip_test_bare", unlabelled, names)
    line = mistake(capfd, scene, "out", *MASKCLIP, "LINEAR_PROBE.DATASETS", "('reclip_test_bare',)")
    assert "'reclip_test_bare' has no labels to train a probe with" in line
    line = mistake(capfd, scene, "out", *MASKCLIP, "LINEAR_PROBE.DATASETS", "()")
    assert "'reclip_test_train_labelled' is not registered" in line
    (scene / "train" / "annotations_detectron2" / "001.png").unlink()
    line = mistake(capfd, scene, "out", *MASKCLIP)
    assert "001.png does not exist" in line


# ---- from a feature store -------------------------------------------------------------------------------------

STORE = ("FEATURE_STORE.VIEWS", "2", "SEED", "0")
KINDS = [("FEATURE_STORE.KIND", "whole"), ("FEATURE_STORE.KIND", "crops")]


@pytest.mark.parametrize("kind", KINDS, ids=["whole", "crops"])
@pytest.mark.parametrize("model", ["maskclip", "rectified"])
def test_from_the_store_as_from_the_same_views_encoded_again(scene, isolated_cache, kind, model):
    """The same classifier, bit for bit; a training from the store and its probe share one store."""
    keys = (*STORE, *kind)
    if model == "maskclip":
        keys += MASKCLIP
        probe(scene, "a", *keys)
        probe(scene, "b", *keys, "FEATURE_STORE.MAX_SIZE", "1e-9")
    else:
        train(scene, "a", "SOLVER.MAX_ITER", "1", *keys)
        weights = ("LINEAR_PROBE.WEIGHTS", str(scene / "a" / "model_final.pth"))
        probe(scene, "a", *keys)
        probe(scene, "b", *keys, *weights, "FEATURE_STORE.MAX_SIZE", "1e-9")
    assert_same(classifier_of(scene, "a"), classifier_of(scene, "b"))
    assert len({file.parent for file in (isolated_cache / "features").glob("*/*.safetensors")}) == 1


@pytest.mark.parametrize("kind", KINDS, ids=["whole", "crops"])
def test_labels_follow_the_views(scene, kind):
    """An image whose red channel is 60 times its label: in each view, too."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (2, 4, 5)).repeat(12, 1).repeat(12, 2).astype(np.uint8)
    records = []
    for number, ids in enumerate(labels):
        for name, pixels in (("image", np.stack([60 * ids] * 3, -1)), ("label", ids)):
            Image.fromarray(pixels).save(scene / f"{name}{number}.png")
        records.append({"file_name": str(scene / f"image{number}.png"), "image_id": str(number),
                        "sem_seg_file_name": str(scene / f"label{number}.png")})  # fmt: skip
    sizes = ("INPUT.MIN_SIZE_TEST", "0", "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.CROP.SIZE", "[24,32]")
    cfg = load_config(str(scene / "config.yaml"), [*STORE, *kind, *sizes, "INPUT.COLOR_JITTER", "0.0"])
    dataset = labelled_views(cfg, make_maskclip(), records, num_classes=4)
    seen = set()
    for draw in range(12):
        number = dataset.fixed.views.number(draw % 2, draw)
        sample, pixels = dataset[draw, draw % 2], dataset.fixed.views.sample(number)["image"]
        assert torch.equal(pixels[0].long(), 60 * sample["sem_seg"])
        assert sample["view_size"] == tuple(sample["sem_seg"].shape) and "sem_seg_file_name" not in sample
        seen.add(number)
    assert len(seen) == 4


def test_models_without_a_frozen_clip_are_probed_on_fresh_crops(scene):
    cfg = load_config(str(scene / "config.yaml"), list(STORE))
    assert labelled_views(cfg, torch.nn.Identity(), []) is None
    cfg.MODEL.CLIP.FINE_TUNE = True
    assert labelled_views(cfg, make_maskclip(), []) is None
