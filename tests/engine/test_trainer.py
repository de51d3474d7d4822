"""Runs of ``train_net.py`` with the trainer's options: precision, accumulation, SyncBN, TensorBoard, processes."""

import json
import logging
import sys

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reclip_d2.config import load_config
from reclip_d2.engine import trainer
from reclip_d2.engine.logs import build_writers
from tests.helpers import (
    datasets,
    isolated_cache,
    register_dataset,
    register_tiny_model,
    stopped_in_iteration,
    write_scenes,
)
from tests.processes import run_processes
from tests.test_train_net import NAMES, assert_same, metrics, mistake, run, scene, weights

__all__ = ["datasets", "isolated_cache", "scene"]

AMP = ("SOLVER.AMP.ENABLED", "True")
PARTS = ("SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "2")


def saved(scene, output: str, name: str = "model_final") -> dict:
    return torch.load(scene / output / f"{name}.pth", weights_only=True)


# ---- precision and accumulation ---------------------------------------------------------------------------------


def test_accumulation_changes_neither_the_number_of_steps_nor_the_images(scene):
    """Without batch norm and noise the parts train as the whole batch; with the crops' colours drawn alike, too."""
    keys = [
        *("MODEL.MASK_DECODER.NORM", ""),
        *("MODEL.LOSS.CONTRASTIVE_WEIGHT", "0.0"),
        *("MODEL.LOSS.COVERAGE_WEIGHT", "1.0"),
        *("SOLVER.IMS_PER_BATCH", "4"),
    ]
    run(scene, "whole", *keys)
    run(scene, "parts", *keys, "SOLVER.ACCUMULATE_STEPS", "2")
    assert metrics(scene, "parts")["iteration"] == metrics(scene, "whole")["iteration"] == 5
    for key, value in weights(scene, "whole").items():
        torch.testing.assert_close(weights(scene, "parts")[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("scaler", [False, True])
def test_resume_with_mixed_precision_and_accumulation(scene, monkeypatch, scaler):
    """Ends bit for bit like an uninterrupted run; with float16 the gradient scaler's state resumes too."""
    keys = [*AMP, *PARTS, "DATALOADER.NUM_WORKERS", "1"]
    if scaler:
        # A real float16 run needs a GPU: bfloat16 arithmetic with float16's scaler, whose scale grows in iterations.
        class Loop(trainer.TrainLoop):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        monkeypatch.setattr(trainer, "TrainLoop", Loop)
    run(scene, "unbroken", *keys)

    with stopped_in_iteration(4, monkeypatch):  # an iteration after the checkpoint is lost
        run(scene, "stopped", *keys)
    run(scene, "stopped", "--resume", *keys)
    assert_same(weights(scene, "unbroken"), weights(scene, "stopped"))
    assert ("grad_scaler" in saved(scene, "stopped")) == scaler
    if scaler:
        assert saved(scene, "stopped")["grad_scaler"] == saved(scene, "unbroken")["grad_scaler"]
        assert saved(scene, "stopped")["grad_scaler"]["scale"] == 64.0  # 8, doubled after iterations 1, 3 and 5


def test_mixed_precision_trains_otherwise_and_evaluates_in_float32(scene):
    run(scene, "full")
    run(scene, "mixed", *AMP, "TEST.EVAL_PERIOD", "6")
    assert "bfloat16 instead of float16" in (scene / "mixed" / "log.txt").read_text()
    key = "mask_decoder.conv.weight"
    assert not torch.equal(weights(scene, "full")[key], weights(scene, "mixed")[key])
    assert all(value.dtype != torch.bfloat16 for value in weights(scene, "mixed").values())
    alone = run(scene, "other", "--eval-only", "MODEL.WEIGHTS", str(scene / "mixed" / "model_final.pth"))
    assert alone["sem_seg"]["mIoU"] == metrics(scene, "mixed")["sem_seg/mIoU"]


def test_more_parts_than_images(scene, capfd):
    assert "SOLVER.ACCUMULATE_STEPS 3 is more than the 2 images" in mistake(
        capfd, scene, "SOLVER.ACCUMULATE_STEPS", "3"
    )


def test_synchronised_batch_norm_in_one_process_is_batch_norm(scene):
    run(scene, "plain")
    run(scene, "sync", "MODEL.MASK_DECODER.NORM", "SyncBN")
    assert_same(weights(scene, "plain"), weights(scene, "sync"))


# ---- what whoever uses the trainer may choose ------------------------------------------------------------------


class Record(HookBase):
    """Remembers which iterations it saw, and the checkpoints that were there after each."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def after_step(self):
        names = sorted(path.name for path in self.folder.glob("model_0*.pth"))
        self.seen.append((self.trainer.iter, [int(name[6:13]) for name in names]))


def test_extra_hooks_and_the_number_of_checkpoints(scene):
    """A checkpoint every iteration: the extra hook runs after the checkpointer, which keeps the last two."""
    keys = ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR", str(scene / "out")]
    (scene / "out").mkdir()
    record = Record(scene / "out")
    made = trainer.Trainer(
        load_config(str(scene / "config.yaml"), keys), extra_hooks=[record], evaluate=False, keep_checkpoints=2
    )
    made.train()
    assert record.seen == [(0, [0]), (1, [0, 1]), (2, [1, 2]), (3, [2, 3])]
    assert (scene / "out" / "model_final.pth").is_file()
    assert "sem_seg/mIoU" not in metrics(scene, "out")


# ---- TensorBoard ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(), (*AMP, *PARTS, "MODEL.MASK_DECODER.ENABLED", "False")], ids=["usual", "mixed"])
def test_tensorboard_shows_losses_rate_and_pictures(scene, keys):
    run(scene, "out", "VIS_PERIOD", "3", "MODEL.LOSS.COVERAGE_WEIGHT", "1.0", "TEST.EVAL_PERIOD", "6", *keys)
    (file,) = (scene / "out").glob("events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    wanted = {"total_loss", "loss_contrastive", "loss_coverage", "lr", "sem_seg/mIoU", "data_time", "time"}
    assert wanted <= set(events.Tags()["scalars"])
    last = {json.loads(line)["iteration"]: json.loads(line) for line in (scene / "out" / "metrics.json").open()}[5]
    assert events.Scalars("total_loss")[-1].value == pytest.approx(last["total_loss"])
    assert events.Scalars("lr")[-1].value == pytest.approx(0.05 * (1 - 5 / 6) ** 0.9)
    (tag,) = events.Tags()["images"]
    assert "prediction" in tag and "bias" in tag
    pictures = events.Images(tag)
    assert {picture.step for picture in pictures} == {0, 3}
    assert {(picture.width, picture.height) for picture in pictures} == {(3 * 32, 24)}  # crops of 24 x 32


def test_without_tensorboard_training_runs_and_says_so_once(scene, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    run(scene, "out", "VIS_PERIOD", "3")
    assert metrics(scene, "out")["iteration"] == 5
    assert not list((scene / "out").glob("events.*"))
    log = (scene / "out" / "log.txt").read_text()
    assert log.count("tensorboard is not installed") == 1 and "pip install tensorboard" in log


def test_writers(tmp_path, monkeypatch, caplog):
    cfg = load_config("", ["OUTPUT_DIR", str(tmp_path)])
    names = [type(getattr(writer, "writer", writer)).__name__ for writer in build_writers(cfg, 3)]
    assert names == ["CommonMetricPrinter", "JSONWriter", "TensorboardXWriter"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        names = [type(getattr(writer, "writer", writer)).__name__ for writer in build_writers(cfg, 3)]
    assert names == ["CommonMetricPrinter", "JSONWriter"] and len(caplog.records) == 1


# ---- two processes on the CPU -----------------------------------------------------------------------------------


def train_in_a_process(rank, folder):
    """Worker: a short run with synchronised norm and two parts a batch."""
    if rank == 0:
        write_scenes(folder / "train", 6, size=(32, 32))
    torch.distributed.barrier()
    images = sorted((folder / "train" / "images").iterdir())
    register_dataset("reclip_test_train", [{"file_name": str(path)} for path in images], NAMES)
    cfg = load_config(
        "",
        [
            *("MODEL.META_ARCHITECTURE", "RectifiedCLIP"),
            *("MODEL.BACKBONE.NAME", "DenseCLIP"),
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.CLIP.NAME", register_tiny_model(folder), "MODEL.CLIP.PRETRAINED", "random"),
            *("MODEL.CLIP.TEMPLATES", "photo", "MODEL.BIAS_HEAD.PROMPT_LENGTH", "4"),
            *("MODEL.MASK_DECODER.NORM", "SyncBN"),
            *("DATASETS.TRAIN", "('reclip_test_train',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0"),
            *("INPUT.MIN_SIZE_TRAIN", "(32,)", "HYPOTHESIS.FILE", str(folder / "hypotheses.jsonl")),
            *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "2", "SOLVER.MAX_ITER", "3", "SEED", "0"),
            *("SOLVER.BASE_LR", "0.05", "OUTPUT_DIR", str(folder / "out")),
        ],
    )
    (folder / "out").mkdir(exist_ok=True)
    torch.manual_seed(0)  # a random CLIP: the same in both
    made = trainer.Trainer(cfg)
    decoder = made.model.module.mask_decoder
    assert isinstance(decoder.norm, NaiveSyncBatchNorm)
    first = decoder.conv.weight.detach().clone()
    made.resume_or_load(resume=False)
    made.train()
    assert not torch.equal(first, decoder.conv.weight)
    torch.save(made.model.module.state_dict(), folder / f"{rank}.pt")


def test_two_processes_end_in_the_same_weights(tmp_path):
    run_processes(train_in_a_process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    assert_same(torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"], first)
