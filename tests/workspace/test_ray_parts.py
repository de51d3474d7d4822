"""Hypotheses and feature stores by workers of Ray, which this process plays here; tests/cli/test_ray.py starts Ray."""

import contextlib
import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from reclip_d2.errors import ReclipError
from reclip_d2.features import shards
from reclip_d2.hypothesis import generate
from reclip_d2.hypothesis.training_records import TrainingImages, build_training_records
from reclip_d2.modeling.build import shared_backbones
from reclip_d2.utils.progress import report_to
from reclip_d2.utils.work_shard import WorkShard
from reclip_d2.workspace.ray_engine import RayEngine
from reclip_d2.workspace.ray_parts import make_parts
from reclip_d2.workspace.stores import store_parts
from tests.helpers import datasets, hypothesis_config, isolated_cache, write_scenes

__all__ = ["datasets", "isolated_cache"]


class HereEngine(RayEngine):
    """An engine whose workers are in this process.

    Attributes:
        asked: names of the items of each pass, in order.
        lost: names of items whose blocks are lost, pass by pass.
    """

    def __init__(self, *lost: str) -> None:
        self.workers, self.asked, self.lost = None, [], list(lost)

    def _started(self, job):
        return contextlib.nullcontext()

    def _rows(self, worker, job, items, largest):
        self.asked.append([item["name"] for item in items])
        lost = self.lost.pop(0) if self.lost else ""
        made = worker(pickle.loads(pickle.dumps(job)))
        for item in items:
            for _ in range(0 if item["name"] in lost else 2):  # twice, as after a lost acknowledgement
                yield from made.answers([dict(item)])


@pytest.fixture
def cfg(tmp_path, datasets, isolated_cache, monkeypatch):
    """Three images; each is a block of hypotheses, and its two views are a shard."""
    datasets("reclip_test_train", write_scenes(tmp_path / "scenes", 3), ["sky", "tall tree", "water", "brick wall"])
    monkeypatch.setattr(generate.ScoreBlocks.__init__, "__defaults__", (1,))
    monkeypatch.setattr(shards, "FEWEST_VIEWS", 2)
    cfg = hypothesis_config(tmp_path)
    cfg.FEATURE_STORE.VIEWS = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 48
    cfg.INPUT.CROP.ENABLED = False
    cfg.DATASETS.TRAIN = ("reclip_test_train",)
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with shared_backbones():
        yield in_folder(cfg, tmp_path / "ray")
    torch.set_num_threads(threads)


def in_folder(cfg, folder: Path):
    cfg = cfg.clone()
    cfg.HYPOTHESIS.FILE, cfg.FEATURE_STORE.FOLDER = str(folder / "hypotheses.jsonl"), str(folder / "features")
    return cfg


def files(folder: Path) -> dict[str, bytes]:
    """The hypotheses, and the shards of features."""
    found = [folder / "hypotheses.jsonl", *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("method", ["crops", pytest.param("dense", marks=pytest.mark.slow)])
def test_the_files_of_a_local_run(cfg, method, tmp_path, monkeypatch):
    cfg.HYPOTHESIS.METHOD = method
    local = in_folder(cfg, tmp_path / "local")
    build_training_records(local)
    for parts in store_parts(local, TrainingImages.of(local)):
        parts.make(WorkShard(1, 1))

    engine, events = HereEngine("1"), []
    with report_to(events.append):
        make_parts(engine, cfg)
    # Three blocks of hypotheses, or two shards of whole images; the one that was lost is asked for again.
    assert engine.asked == [["0", "1", "2"] if method == "crops" else ["0", "1"], ["1"], ["0", "1", "2"]]
    first = "hypotheses" if method == "crops" else "features"
    ends = [(event.stage, event.done, event.total) for event in events if event.ended]
    assert ends == [(first, 3, 3), ("features", 6, 6)]
    with monkeypatch.context() as patch:  # nothing is left to compute
        patch.setattr(generate, "_window_arrays", None)
        patch.setattr("reclip_d2.features.store.FeatureStore._encode", None)
        build_training_records(cfg)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    # Repeated, it asks for what is missing, and for damaged files.
    first, second, *_ = sorted((tmp_path / "ray").rglob("*.safetensors"))
    first.unlink()
    second.write_bytes(b"damaged")
    make_parts(again := HereEngine(), cfg)
    assert again.asked == [["0", "1"]] and files(tmp_path / "ray") == files(tmp_path / "local")
    make_parts(again, cfg)
    assert len(again.asked) == 1


def test_a_broken_image_ends_the_run_as_it_does_locally(cfg, tmp_path):
    Path(TrainingImages.of(cfg).records[1]["file_name"]).write_bytes(b"not an image")
    with pytest.raises(ReclipError) as local:
        build_training_records(in_folder(cfg, tmp_path / "local"))
    with pytest.raises(ReclipError) as ray:
        make_parts(HereEngine(), cfg)
    assert str(ray.value) == str(local.value)
    assert len(list((tmp_path / "ray").rglob("*.npz"))) == 1  # the part before it is kept


def test_parts_that_end_their_workers(cfg, tmp_path):
    with pytest.raises(ReclipError, match="2 of 3 parts of the hypotheses could not be made; .* ended 4 times"):
        make_parts(HereEngine("12", "12"), cfg)
    engine = HereEngine()
    make_parts(engine, cfg, stores=False)
    assert engine.asked == [["1", "2"]] and not (tmp_path / "ray" / "features").exists()


def test_a_worker_that_would_compute_something_else(cfg):
    class Other(HereEngine):
        def _rows(self, worker, job, *arguments):
            other = job.cfg.clone()
            other.HYPOTHESIS.WINDOW_RATIO = 0.25
            return super()._rows(worker, dataclasses.replace(job, cfg=other), *arguments)

    with pytest.raises(ReclipError, match="a worker cannot start: it has other weights of CLIP"):
        make_parts(Other(), cfg)


def test_no_room(cfg, tmp_path):
    """A store without room is left to the training, which encodes views in each iteration."""
    cfg.FEATURE_STORE.MAX_SIZE = 1e-9
    make_parts(engine := HereEngine(), cfg)
    assert engine.asked == [["0", "1", "2"]] and not list((tmp_path / "ray").rglob("*.safetensors"))
