"""``train_net.py`` from JPEGs on disk to checkpoints and mIoU, on a data set of a few small files.

Most runs are in this process (a program's start takes seconds); what a shell sees is tested by one real program.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.engine import program, trainer
from reclip_d2.experiments import execute
from reclip_d2.hypothesis import training_records
from tests.helpers import (
    datasets,
    isolated_cache,
    register_dataset,
    stopped_in_iteration,
    tiny_config,
    unregister_dataset,
    watch_opened_files,
    write_scenes,
)
from tests.kills import run_killed, run_with_kills

__all__ = ["datasets", "isolated_cache"]

ROOT = Path(__file__).parents[1]
NAMES = ["sky", "tall tree", "water", "brick wall"]
EVALUATE = ("--eval-only", "MODEL.META_ARCHITECTURE", "MaskCLIP")
SLIDING = {"ENABLED": "True", "SIZE": "[32, 32]", "STRIDE": "[16, 16]"}


@pytest.fixture
def one_thread():
    """As in the processes that are killed: sums over another number of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scene(tmp_path, datasets) -> Path:
    """A folder with the data sets ``reclip_test_train`` and ``reclip_test_val`` (registered) and a config file."""
    datasets("reclip_test_train", write_scenes(tmp_path / "train", 6), NAMES)
    datasets("reclip_test_val", write_scenes(tmp_path / "val", 3, size=(36, 44), seed=1), NAMES)
    (tmp_path / "config.yaml").write_text(
        f"""
{tiny_config(tmp_path)}
HYPOTHESIS: {{WINDOW_RATIO: 0.5, THRESHOLD: 0.2}}
DATASETS: {{TRAIN: [reclip_test_train], TEST: [reclip_test_val]}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT:
  MIN_SIZE_TRAIN: [32]
  MIN_SIZE_TEST: 36
  CROP: {{ENABLED: true, SIZE: [24, 32]}}
  COLOR_JITTER: 0.2
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 6, CHECKPOINT_PERIOD: 3, BASE_LR: 0.05}}
"""
    )
    return tmp_path


def run(scene: Path, output: str, *arguments: str) -> dict | None:
    """``train_net.py --config-file config.yaml ... OUTPUT_DIR output``; arguments that begin with -- come first."""
    flags = [a for a in arguments if a.startswith("--")]
    keys = [a for a in arguments if not a.startswith("--")]
    config = [] if "--config-file" in flags else ["--config-file", str(scene / "config.yaml")]
    args = program.argument_parser().parse_args([*config, *flags, "OUTPUT_DIR", str(scene / output), *keys])
    return program.main(args)


def weights(scene: Path, output: str, name: str = "model_final") -> dict[str, torch.Tensor]:
    return torch.load(scene / output / f"{name}.pth", weights_only=True)["model"]


def assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def metrics(scene: Path, output: str) -> dict:
    """Last values of a run's metrics; ``iteration`` is that of the last loss (the evaluation is written after it)."""
    merged = {}
    for line in (scene / output / "metrics.json").read_text().splitlines():
        values = json.loads(line)
        if "total_loss" not in values:
            values.pop("iteration")
        merged.update(values)
    return merged


# ---- a whole run ----------------------------------------------------------------------------------------------


def test_training_from_files_to_a_checkpoint_and_a_number(scene, isolated_cache):
    run(scene, "out", "TEST.EVAL_PERIOD", "3", "VIS_PERIOD", "2")
    last = metrics(scene, "out")
    assert last["iteration"] == 5
    assert 0 < last["total_loss"] < 20
    assert 0 <= last["sem_seg/mIoU"] <= 100
    names = {path.name for path in (scene / "out").iterdir()}
    assert {"model_0000002.pth", "model_0000005.pth", "model_final.pth", "last_checkpoint"} <= names
    assert {"config.yaml", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len(list((isolated_cache / "hypotheses").glob("*.jsonl"))) == 1  # made by itself
    assert len(list((isolated_cache / "query_features").glob("[!.]*"))) == 1

    keys = set(weights(scene, "out"))
    assert all(key.startswith(("bias_head.", "mask_decoder.")) for key in keys)
    log = (scene / "out" / "log.txt").read_text()
    assert "6 training images" in log and "classes per image (" in log
    assert "total_loss" in log and "eta" in log


def test_weights_move_and_the_loss_of_the_extensions_is_logged(scene):
    weighted = ["MODEL.LOSS.COVERAGE_WEIGHT", "1.0", "MODEL.LOSS.OUTSIDE_WEIGHT", "0.5"]
    run(scene, "out", *weighted, "HYPOTHESIS.CALIBRATED", "True")
    last = metrics(scene, "out")
    assert {"loss_contrastive", "loss_coverage", "loss_outside"} <= set(last)
    early, late = weights(scene, "out", "model_0000002"), weights(scene, "out")
    assert not any(torch.equal(early[key], late[key]) for key in early)


def test_evaluation_alone_gives_the_number_of_the_end_of_training(scene):
    run(scene, "out", "TEST.EVAL_PERIOD", "6")
    expected = metrics(scene, "out")["sem_seg/mIoU"]
    resumed = run(scene, "out", "--eval-only", "--resume")["sem_seg"]
    assert resumed["mIoU"] == expected
    file = str(scene / "out" / "model_final.pth")
    named = run(scene, "other", "--eval-only", "MODEL.WEIGHTS", file)["sem_seg"]
    logits = run(scene, "other", "--eval-only", "MODEL.WEIGHTS", file, "TEST.LABEL_MAPS", "False")["sem_seg"]
    assert named["mIoU"] == logits["mIoU"] == expected
    untrained = weights(scene, "out", "model_0000002")
    assert not torch.equal(untrained["mask_decoder.conv.weight"], weights(scene, "out")["mask_decoder.conv.weight"])


def test_maskclip_and_its_controls(scene):
    plain = run(scene, "out", *EVALUATE)
    assert 0 <= plain["sem_seg"]["mIoU"] <= 100
    for keys in (
        ["MODEL.MASKCLIP.CALIBRATION", "class"],
        ["MODEL.MASKCLIP.CALIBRATION", "position_class"],
        ["MODEL.MASKCLIP.MEAN_FILTER", "3"],
        [part for key, value in SLIDING.items() for part in (f"TEST.SLIDING_WINDOW.{key}", value)],
    ):
        result = run(scene, "out", *EVALUATE, *keys)
        assert 0 <= result["sem_seg"]["mIoU"] <= 100


def test_another_dense_attention_and_its_options(scene, capfd):
    resclip = ("MODEL.CLIP.DENSE_ATTENTION", "resclip")
    run(scene, "out", *resclip, "MODEL.CLIP.RESCLIP_WEIGHT", "0.5", "TEST.EVAL_PERIOD", "6")
    assert 0 <= metrics(scene, "out")["sem_seg/mIoU"] <= 100
    file = str(scene / "out" / "model_final.pth")
    line = mistake(capfd, scene, "--eval-only", *resclip, "MODEL.WEIGHTS", file)
    assert "of another MODEL.CLIP.RESCLIP_WEIGHT: 0.5 instead of 0.3; use the MODEL.CLIP.RESCLIP_WEIGHT that" in line


# ---- repeatable, resumable, label-blind -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(scene):
    run(scene, "first")
    run(scene, "second", "DATALOADER.NUM_WORKERS", "2")
    assert_same(weights(scene, "first"), weights(scene, "second"))
    run(scene, "third", "SEED", "1")
    key = "bias_head.reference_prompt.vectors"
    assert not torch.equal(weights(scene, "first")[key], weights(scene, "third")[key])


def test_resume_goes_on_and_ends_as_an_unbroken_run(scene, monkeypatch):
    run(scene, "unbroken", "SOLVER.WARMUP_ITERS", "4")

    with stopped_in_iteration(4, monkeypatch):  # an iteration after the checkpoint is lost
        run(scene, "stopped", "SOLVER.WARMUP_ITERS", "4")
    assert (scene / "stopped" / "last_checkpoint").read_text() == "model_0000002.pth"

    seen = []

    run_step = trainer.Trainer.run_step

    def watch(self):
        seen.append((self.iter, self._trainer.optimizer.param_groups[0]["lr"]))
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run_step", watch)
        run(scene, "stopped", "--resume", "SOLVER.WARMUP_ITERS", "4")
    # Warm-up by Detectron2's default from 0.001 of the rate over four iterations, then poly.
    end = (1 - 4 / 6) ** 0.9
    expected = [0.05 * (0.001 + (end - 0.001) * 3 / 4), 0.05 * end, 0.05 * (1 - 5 / 6) ** 0.9]
    assert [iteration for iteration, _ in seen] == [3, 4, 5]
    assert [rate for _, rate in seen] == pytest.approx(expected)
    assert_same(weights(scene, "unbroken"), weights(scene, "stopped"))
    assert metrics(scene, "stopped")["iteration"] == 5


def test_resume_of_a_finished_run_does_nothing(scene):
    run(scene, "out")
    before = weights(scene, "out")
    run(scene, "out", "--resume")
    assert_same(before, weights(scene, "out"))


def test_resume_without_a_checkpoint_begins(scene):
    run(scene, "fresh", "--resume")
    run(scene, "usual")
    assert_same(weights(scene, "fresh"), weights(scene, "usual"))


def kill_before(name: str):
    """Arrange that the process is killed when it is about to write a checkpoint."""

    def arrange() -> None:
        save = program.ReclipCheckpointer.save

        def saving(self: object, given: str, **kwargs: object) -> None:
            if given == name:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, given, **kwargs)

        program.ReclipCheckpointer.save = saving

    return arrange


def test_a_kill_between_the_last_checkpoint_and_the_final_one(scene, one_thread):
    """MAX_ITER 6 is a multiple of CHECKPOINT_PERIOD 3: a resume begins at the end, and makes no iteration."""
    run(scene, "whole")
    assert run_killed(lambda: run(scene, "killed"), kill_before("model_final")) == -signal.SIGKILL
    assert not (scene / "killed" / "model_final.pth").exists()
    (scene / "killed" / ".model_final.pth.0a1b2c3d.tmp.pth").touch()
    run(scene, "killed", "--resume")
    whole, resumed = (torch.load(scene / name / "model_final.pth", weights_only=True) for name in ("whole", "killed"))
    assert_same(whole["model"], resumed["model"])
    assert whole["iteration"] == resumed["iteration"] == 5
    assert {p.name for p in (scene / "killed").glob("*.pth")} == {p.name for p in (scene / "whole").glob("*.pth")}
    assert not any(path.name.endswith(".tmp.pth") for path in (scene / "killed").iterdir())
    written = (scene / "killed" / "model_final.pth").stat().st_mtime_ns
    run(scene, "killed", "--resume")  # and once more: nothing to do
    assert (scene / "killed" / "model_final.pth").stat().st_mtime_ns == written


@pytest.mark.slow
def test_killed_at_every_rename(scene, one_thread, monkeypatch):
    run(scene, "whole")
    monkeypatch.setenv("RECLIP_CACHE", str(scene / "cache"))  # text features and hypotheses are made again, too
    moments = run_with_kills(lambda: run(scene, "killed", "--resume"), scene)
    assert set(moments) >= {
        "before training.json", "after 000000.npz", "before model_0000002.pth", "after model_0000002.pth",
        "before last_checkpoint: model_0000005.pth", "before model_final.pth", "after model_final.pth",
    }  # fmt: skip
    assert_same(weights(scene, "killed"), weights(scene, "whole"))
    names = {path.name for folder in ("killed", "cache") for path in (scene / folder).rglob("*")}
    assert not any(".tmp" in name or ".parts-" in name for name in names)


OTHER_SETTINGS = {
    "SEED": "1",
    "SOLVER.BASE_LR": "0.01",
    "SOLVER.IMS_PER_BATCH": "3",
    "HYPOTHESIS.THRESHOLD": "0.3",
    "MODEL.BIAS_HEAD.RECTIFICATION": "none",
    "INPUT.CROP.SIZE": "(24, 24)",
    "MODEL.LOSS.COVERAGE_WEIGHT": "1.0",
    "DATASETS.TRAIN": "('reclip_test_val',)",
}


def test_resume_with_other_settings_is_refused(scene, capfd, datasets):
    run(scene, "out", "SOLVER.MAX_ITER", "3")
    datasets("reclip_test_more", write_scenes(scene / "more", 2), NAMES)
    before = {path: path.read_bytes() for path in (scene / "out").iterdir() if path.is_file()}
    for key, value in OTHER_SETTINGS.items():
        line = mistake(capfd, scene, "--resume", key, value)
        assert f"{scene}/out was trained with {key} " in line and "give --overwrite" in line
        assert {path: path.read_bytes() for path in (scene / "out").iterdir() if path.is_file()} == before
    line = mistake(capfd, scene, "--resume", "SEED", "1", "SOLVER.MOMENTUM", "0.8")
    assert "(and 1 more)" in line


def test_resume_with_other_images_is_refused(scene, capfd, datasets):
    run(scene, "out", "SOLVER.MAX_ITER", "3")
    unregister_dataset("reclip_test_train")
    register_dataset("reclip_test_train", write_scenes(scene / "others", 5), NAMES)
    assert "was trained on 6 images, but DATASETS.TRAIN now has others (5)" in mistake(capfd, scene, "--resume")


def test_a_training_may_be_made_longer_but_not_shorter(scene, capfd):
    free = ["SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "1"]
    run(scene, "out", "SOLVER.MAX_ITER", "3")
    run(scene, "out", "--resume", "SOLVER.MAX_ITER", "5", *free)
    assert metrics(scene, "out")["iteration"] == 4
    log = (scene / "out" / "log.txt").read_text()
    assert "SOLVER.MAX_ITER is 5 and was 3: from now on the learning rate follows the new schedule" in log
    line = mistake(capfd, scene, "--resume", "SOLVER.MAX_ITER", "2")
    assert "is of iteration 5, after SOLVER.MAX_ITER 2" in line


def test_resume_of_a_run_that_does_not_say_its_settings(scene, capfd):
    run(scene, "out", "SOLVER.MAX_ITER", "3")
    record = scene / "out" / "training.json"
    sound = json.loads(record.read_text())
    for damage in ("{", "[]", json.dumps({**sound, "processes": 0}), "[" * 100_000):
        record.write_text(damage)
        assert "training.json is damaged" in mistake(capfd, scene, "--resume")
    record.unlink()
    run(scene, "out", "--resume", "SEED", "3")
    assert "cannot check the settings that the training started with" in capfd.readouterr().out
    assert json.loads(record.read_text())["settings"]["SEED"] == 3


def test_two_trainings_in_one_folder(scene, capfd):
    with program.run_lock(str(scene / "out")):
        assert f"another training is running in {scene}/out" in mistake(capfd, scene, "SEED", "3")
        assert [path.name for path in (scene / "out").iterdir()] == [".lock"]
        run(scene, "out", *EVALUATE)  # an evaluation may look at it
    run(scene, "out", "SOLVER.MAX_ITER", "1")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"../x.pth", b"/etc/x.pth", b"", b"model_0000002.pth\0", b"a" * 5000])
def test_what_last_checkpoint_may_say(scene, capfd, name):
    (scene / "out").mkdir()
    (scene / "out" / "last_checkpoint").write_bytes(name)
    assert f"{scene}/out/last_checkpoint" in mistake(capfd, scene, "--resume")


DENSE = (
    *("HYPOTHESIS.METHOD", "dense", "HYPOTHESIS.CLASS_SHARES", "estimated", "HYPOTHESIS.THRESHOLD", "0.05"),
    *("FEATURE_STORE.VIEWS", "2", "FEATURE_STORE.KIND", "whole"),
)


@pytest.mark.parametrize("options", [(), DENSE], ids=["crops", "dense hypotheses, estimated shares"])
def test_training_is_blind_to_labels(scene, monkeypatch, options):
    """Without the label files, and with every way to open one barred, the weights are the same, bit for bit."""
    run(scene, "with_labels", *options)
    labels = scene / "train" / "annotations_detectron2"
    for path in labels.iterdir():
        path.unlink()
    opened = []

    def guard(path: str) -> None:
        if path.startswith(str(labels)):
            raise AssertionError(f"training opens a label: {path}")
        opened.append(path)

    monkeypatch.setenv("RECLIP_CACHE", str(scene / "another_cache"))  # hypotheses are made again, label-blind too
    with watch_opened_files(guard):
        run(scene, "without_labels", *options)
    assert any(name.endswith(".jpg") for name in opened)
    assert_same(weights(scene, "with_labels"), weights(scene, "without_labels"))


@pytest.mark.slow
@pytest.mark.parametrize("world", ["embedded", "embedded_longtail"])
def test_training_on_the_embedded_worlds_is_blind_to_labels(tmp_path, monkeypatch, world):
    """As above, with the default of own images: estimated class shares, dense hypotheses, the feature store."""

    def train(name: str) -> dict[str, torch.Tensor]:
        files = [str(ROOT / "configs" / part) for part in (f"datasets/{world}.yaml", "methods/reclippp_shares.yaml")]
        options = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0", "SEED", "0"]
        cfg = load_config(files, [*options, "OUTPUT_DIR", str(tmp_path / name)])
        return {key: value.clone() for key, value in execute.train(cfg).model.state_dict().items()}

    monkeypatch.setenv("RECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # the world is made there
    expected = train("with_labels")
    labels = list((tmp_path / world).rglob("*.png"))
    assert len(labels) >= 400 and len(list((tmp_path / world).rglob("train/*.jpg"))) == 400
    for path in labels:
        path.write_bytes(b"no label")
    for made in ("features", "hypotheses"):
        shutil.rmtree(tmp_path / "cache" / made)

    def guard(path: str) -> None:
        assert "/annotations_detectron2/" not in path, f"training opens a label: {path}"

    with watch_opened_files(guard):
        found = train("without_labels")
    assert_same(expected, found)


def test_overwrite_forgets_the_run_that_it_replaces(scene, monkeypatch):
    run(scene, "out")

    class Killed(BaseException):
        pass

    def die(self):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Trainer, "run_step", die)  # before the first checkpoint
        run(scene, "out", "--overwrite", "SEED", "3")
    run(scene, "out", "--resume", "SEED", "3")
    run(scene, "usual", "SEED", "3")
    assert_same(weights(scene, "out"), weights(scene, "usual"))
    assert metrics(scene, "out")["total_loss"] == metrics(scene, "usual")["total_loss"]
    assert (scene / "out/metrics.json").read_text().count('"sem_seg/mIoU"') == 1


# ---- mistakes -------------------------------------------------------------------------------------------------


def error_line(capfd, function) -> str:
    """The one line of a run that ends with exit status 1; nothing in the output is a traceback."""
    with pytest.raises(SystemExit) as caught:
        function()
    assert caught.value.code == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def mistake(capfd, scene, *arguments: str) -> str:
    return error_line(capfd, lambda: run(scene, "out", *arguments))


def break_image(scene: Path, split: str, index: int = 2) -> str:
    path = scene / split / "images" / f"{index:03d}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return str(path)


def test_unknown_data_sets(scene, capfd):
    line = mistake(capfd, scene, "DATASETS.TRAIN", "('reclip_test_none',)")
    assert "'reclip_test_none' is not registered" in line
    line = mistake(capfd, scene, *EVALUATE, "DATASETS.TEST", "('reclip_test_none',)")
    assert "'reclip_test_none' is not registered" in line


def test_no_training_set(scene, capfd):
    assert "no training images" in mistake(capfd, scene, "DATASETS.TRAIN", "()")


def test_missing_image_folder(scene, capfd):
    (scene / "train" / "images").rename(scene / "moved")
    assert "images/000.jpg does not exist" in mistake(capfd, scene)


def test_broken_image_while_hypotheses_are_made(scene, capfd):
    path = break_image(scene, "train")
    assert path in mistake(capfd, scene)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_in_training(scene, capfd, monkeypatch, workers):
    """An image that breaks once the hypotheses are there; before that, its changed content would be noticed."""
    monkeypatch.setattr(training_records, "images_digest", lambda records: "the same")
    keys = ["HYPOTHESIS.FILE", str(scene / "h.jsonl"), "DATALOADER.NUM_WORKERS", workers]
    run(scene, "good", *keys, "SOLVER.MAX_ITER", "1")
    capfd.readouterr()
    path = break_image(scene, "train")
    line = mistake(capfd, scene, *keys)
    assert path in line and "cannot be read" in line


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_in_evaluation(scene, capfd, workers):
    path = break_image(scene, "val", 1)
    line = mistake(capfd, scene, *EVALUATE, "DATALOADER.NUM_WORKERS", workers)
    assert path in line and "cannot be read" in line


def test_missing_label_in_evaluation(scene, capfd):
    (scene / "val" / "annotations_detectron2" / "001.png").unlink()
    line = mistake(capfd, scene, *EVALUATE)
    assert "annotations_detectron2/001.png does not exist" in line


def test_evaluation_on_a_data_set_without_labels(scene, capfd, datasets):
    datasets("reclip_test_bare", [{"file_name": str(scene / "val" / "images" / "000.jpg")}], NAMES)
    line = mistake(capfd, scene, *EVALUATE, "DATASETS.TEST", "('reclip_test_bare',)")
    assert "'reclip_test_bare' has no labels" in line


def test_evaluation_on_an_empty_data_set(scene, capfd, datasets):
    datasets("reclip_test_empty", [], NAMES)
    line = mistake(capfd, scene, *EVALUATE, "DATASETS.TEST", "('reclip_test_empty',)")
    assert "reclip_test_empty" in line


def test_a_run_in_the_way_is_left_as_it_is(scene, capfd):
    run(scene, "out")
    before = {path.name: path.read_bytes() for path in (scene / "out").iterdir() if path.is_file()}
    capfd.readouterr()
    assert f"{scene}/out holds a trained run: add --resume, --overwrite" in mistake(capfd, scene, "SEED", "3")
    assert {path.name: path.read_bytes() for path in (scene / "out").iterdir() if path.is_file()} == before


def test_the_last_checkpoint_is_gone(scene, capfd):
    run(scene, "out")
    (scene / "out/model_final.pth").unlink()
    capfd.readouterr()
    line = mistake(capfd, scene, "--resume")
    assert f"{scene}/out/model_final.pth, the last of the run, does not exist: put it back, or" in line


def test_devices_that_are_not_there(scene, capfd, monkeypatch):
    assert "MODEL.DEVICE is 'gpu'; it must be cpu, cuda or cuda:N" in mistake(capfd, scene, "MODEL.DEVICE", "gpu")
    count = torch.cuda.device_count()
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--num-gpus", str(count + 2)])
    line = error_line(capfd, lambda: program.run_program(program.main))
    assert f"--num-gpus {count + 2}: this machine has {count}" in line


def test_the_disk_is_full(scene, capfd):
    """Files of at most 30 kB: a checkpoint has more; the hypotheses and the logs have less."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        line = mistake(capfd, scene, "TEST.EVAL_PERIOD", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.endswith("/model_0000002.pth: File too large"), line
    assert not list((scene / "out").glob("*.pth")) and not list((scene / "out").glob(".model*"))


def test_ctrl_c(scene, capfd, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.SeedIteration, "before_step", interrupt)
    with pytest.raises(SystemExit) as end:
        run(scene, "out", "SEED", "1")
    assert end.value.code == 130
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == "interrupted: add --resume to continue from the last checkpoint"
    assert "Traceback" not in err


def test_an_address_that_cannot_be_reached(scene, capfd, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(scene / "fetched"))
    address = "http://127.0.0.1:9/model.pth"  # nothing listens at the discard port
    line = mistake(capfd, scene, "--eval-only", "MODEL.WEIGHTS", address)
    assert address in line or "Connection refused" in line
    assert "cannot be fetched" in line


def test_maskclip_does_not_train(scene, capfd):
    assert "--eval-only" in mistake(capfd, scene, "MODEL.META_ARCHITECTURE", "MaskCLIP")


def test_nothing_to_evaluate(scene, capfd):
    assert "MODEL.WEIGHTS" in mistake(capfd, scene, "--eval-only")
    assert "does not exist" in mistake(capfd, scene, "--eval-only", "MODEL.WEIGHTS", str(scene / "none.pth"))


@pytest.mark.parametrize("flags", [(), ("--eval-only",)], ids=["train", "evaluate"])
def test_missing_inputs_are_found_before_anything_is_built_or_written(scene, capfd, monkeypatch, flags):
    def build(cfg: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(trainer.Trainer, "build_model", build)
    line = mistake(capfd, scene, *flags, "MODEL.WEIGHTS", str(scene / "none.pth"))
    assert f"{scene}/none.pth does not exist: check MODEL.WEIGHTS" in line
    if flags:
        assert "nothing to evaluate: set MODEL.WEIGHTS" in mistake(capfd, scene, *flags)
    folder, weights = "val" if flags else "train", scene / "there.pth"
    weights.touch()
    shutil.rmtree(scene / folder / "images")
    line = mistake(capfd, scene, *flags, "MODEL.WEIGHTS", str(weights))
    assert f"{scene}/{folder}/images/000.jpg does not exist" in line
    assert not (scene / "out").exists()


def test_class_lists(scene, capfd, datasets):
    image = {"file_name": str(scene / "train" / "images" / "000.jpg")}
    for index, (names, expected) in enumerate(
        [
            ([], "class list is empty"),
            (["sky", ""], "empty name"),
            (["sky", "Sky"], "share the name"),
            (["sky", "tree " * 90], "the text encoder takes"),
        ]
    ):
        name = datasets(f"reclip_test_names_{index}", [image], names)
        assert expected in mistake(capfd, scene, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()")


def test_checkpoint_of_another_class_list(scene, capfd, datasets):
    run(scene, "good", "SOLVER.MAX_ITER", "1")
    capfd.readouterr()
    records = write_scenes(scene / "other", 2, size=(36, 44), seed=1)
    datasets("reclip_test_other", records, ["sky", "tall tree", "sea", "brick wall"])
    keys = ["DATASETS.TRAIN", "('reclip_test_other',)", "DATASETS.TEST", "('reclip_test_other',)"]
    line = mistake(capfd, scene, "--eval-only", *keys, "MODEL.WEIGHTS", str(scene / "good" / "model_final.pth"))
    assert "another class list: class 2 is 'water' instead of 'sea'" in line
    line = mistake(capfd, scene, *keys, "MODEL.WEIGHTS", str(scene / "good" / "model_final.pth"))
    assert "another class list" in line


def test_different_class_lists_in_one_config(scene, capfd, datasets):
    datasets("reclip_test_other", [], ["a", "b"])
    assert "different class lists" in mistake(capfd, scene, "DATASETS.TEST", "('reclip_test_other',)")


def test_other_keys(scene, capfd):
    assert "MODEL.CLIP.NAME" in mistake(capfd, scene, "MODEL.CLIP.NAME", "nothing")
    assert "MODEL.CLIP.TEMPLATES" in mistake(capfd, scene, "MODEL.CLIP.TEMPLATES", "nothing")
    assert "MODEL.BACKBONE.NAME" in mistake(capfd, scene, "MODEL.BACKBONE.NAME", "build_resnet_backbone")


def test_a_name_that_no_registry_knows(scene, capfd):
    assert "MODEL.BIAS_HEAD.NAME" in mistake(capfd, scene, "MODEL.BIAS_HEAD.NAME", "Nothing")
    assert "MODEL.META_ARCHITECTURE" in mistake(capfd, scene, "MODEL.META_ARCHITECTURE", "Nothing")


def test_a_loss_that_is_not_finite_stops_the_run(scene, capfd):
    line = mistake(capfd, scene, "SOLVER.BASE_LR", "1e38", "MODEL.MASK_DECODER.NORM", "")
    assert "is not finite: " in line and ".jpg" not in line and "lower SOLVER.BASE_LR" in line


# ---- what a shell sees ----------------------------------------------------------------------------------------


def shell(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_program(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("FOO:\n  BAR: 1\n")
    done = shell("--config-file", str(config), "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cpu")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "FOO" in lines[0] and str(config) in lines[0]
