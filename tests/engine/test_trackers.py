"""Experiment trackers: what they are sent, and how runs continue. The packages are stand-ins that record calls."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from reclip_d2.config import load_config
from reclip_d2.engine.logs import build_writers
from reclip_d2.engine.trackers import FILE, as_pixels, build_trackers, check_trackers, new_scalars
from reclip_d2.errors import ReclipError


class Wandb(types.ModuleType):
    """Records runs and what they log."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0
        self.Image = lambda pixels: ("image", pixels.shape)

    def init(self, **arguments):
        self.started.append(arguments)
        self.id = arguments["id"] or f"run{len(self.started)}"
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


class MLflow(types.ModuleType):
    """Records the same for MLflow."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls = []

    def start_run(self, run_id=None, run_name=None):
        self.calls.append(("start_run", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "m1"))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, *args, kwargs))


def config(folder, *names):
    return load_config("", ["OUTPUT_DIR", str(folder / "reclip"), "TRACKERS.USE", str(list(names))])


@pytest.fixture
def output(tmp_path):
    (tmp_path / "reclip").mkdir()
    return tmp_path


def test_wandb(output, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (writer,) = build_trackers(config(output, "wandb"), {"SOLVER.BASE_LR": 0.01})
    with EventStorage(0) as storage:
        for iteration in range(3):
            storage.put_scalars(total_loss=float(iteration), lr=0.5, smoothing_hint=False)
            if iteration == 1:
                storage.put_scalar("diverged", math.nan)
                storage.put_image("scene", torch.full((3, 4, 6), 0.5))
                writer.write()
            storage.step()
        writer.write()
        writer.write()  # nothing new
    writer.close()
    (started,) = wandb.started
    assert started == {
        "project": "reclip_d2", "name": "reclip", "id": None, "resume": None, "config": {"SOLVER.BASE_LR": 0.01}
    }  # fmt: skip
    assert wandb.logged[0] == (1, {"total_loss": 1.0, "lr": 0.5})
    assert wandb.logged[1] == (1, {"scene": ("image", (4, 6, 3))})
    assert (2, {"total_loss": 2.0, "lr": 0.5}) in wandb.logged[2:]
    assert sum("total_loss" in values for _, values in wandb.logged) == 2 and wandb.finished == 1


def test_images_are_sent_once_and_never_with_an_earlier_step(output, monkeypatch):
    """A picture of iteration 0 is written together with the scalars of iteration 2."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (writer,) = build_trackers(config(output, "wandb"), {})
    with EventStorage(0) as storage:
        storage.put_image("scene", torch.zeros(3, 4, 6))
        storage.step()
        storage.step()
        storage.put_scalar("loss", 1.0, smoothing_hint=False)
        writer.write()
        writer.write()
    assert wandb.logged == [(2, {"loss": 1.0}), (2, {"scene": ("image", (4, 6, 3))})]


def test_a_resumed_training_continues_its_run(output, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        build_trackers(config(output, "wandb"), {})
    assert [(start["id"], start["resume"]) for start in wandb.started] == [(None, None), ("run1", "allow")]
    assert json.loads((output / "reclip" / FILE).read_text()) == {"wandb": "run1"}


def test_mlflow(output, monkeypatch):
    mlflow = MLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    settings = {f"KEY{i}": "x" * 600 for i in range(130)}
    (writer,) = build_trackers(config(output, "mlflow"), settings)
    with EventStorage(5) as storage:
        storage.put_scalar("sem_seg/IoU-a, b", 3.0, smoothing_hint=False)
        storage.put_image("image | mask", torch.zeros(3, 2, 2))
        writer.write()
    writer.close()
    names = [call[0] for call in mlflow.calls]
    assert names == ["set_experiment", "start_run", "log_params", "log_params", "log_metrics", "log_image", "end_run"]
    assert [len(call[1]) for call in mlflow.calls if call[0] == "log_params"] == [100, 30]
    assert all(len(value) == 500 for value in mlflow.calls[2][1].values())
    assert mlflow.calls[4] == ("log_metrics", {"sem_seg/IoU-a_ b": 3.0}, {"step": 5})
    assert mlflow.calls[5][2] == {"artifact_file": "image _ mask_0000005.png"}
    mlflow.calls.clear()
    build_trackers(config(output, "mlflow"), settings)
    assert mlflow.calls[1:] == [("start_run", "m1", None)]


def test_trackers_come_before_the_writer_that_removes_images(output, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    names = [type(getattr(writer, "writer", writer)).__name__ for writer in build_writers(config(output, "wandb"), 3)]
    assert names[0] == "WandbWriter" and len(names) > 2


def test_a_missing_package_is_named_before_the_training(output, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ReclipError, match=r"not installed: pip install 'reclip_d2\[wandb\]'"):
        check_trackers(config(output, "wandb"))
    check_trackers(config(output))


def test_a_tracker_that_cannot_start(output, monkeypatch):
    wandb = Wandb()
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ReclipError, match="wandb cannot start a run: division by zero; check its login"):
        build_trackers(config(output, "wandb"), {})
    assert not (output / "reclip" / FILE).exists()


def test_an_unknown_tracker(output):
    with pytest.raises(ReclipError, match=r"TRACKERS\.USE"):
        config(output, "tensorboardx")


def test_scalars_are_grouped_by_iteration():
    with EventStorage(0) as storage:
        storage.put_scalar("a", 1.0, smoothing_hint=False)
        storage.step()
        storage.put_scalar("b", 2.0, smoothing_hint=False)
        assert new_scalars(storage, -1) == {0: {"a": 1.0}, 1: {"b": 2.0}}
        assert new_scalars(storage, 0) == {1: {"b": 2.0}}


def test_images_as_pixels():
    assert as_pixels(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]
    assert as_pixels(np.full((3, 2, 1), 7, np.uint8)).shape == (2, 1, 3)
