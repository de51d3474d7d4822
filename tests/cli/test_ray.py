"""``--engine ray``: the files of a local run, also when a worker dies. Needs Ray, which `make env` does not install."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.errors import ReclipError
from reclip_d2.formats.pictures import png_bytes
from reclip_d2.workspace.options import PredictOptions, SegmentOptions
from reclip_d2.workspace.predict import PredictRun, engine_of
from reclip_d2.workspace.ray_engine import LARGEST_BLOCK, LostBlocks, RayEngine
from reclip_d2.workspace.ray_masks import MaskJob, write_masks
from reclip_d2.workspace.run_folder import RunFolder
from reclip_d2.workspace.segment import SegmentRun
from tests.cli.conftest import FAST_KEYS, all_files, picture, segment_arguments
from tests.cli.test_memory import write_images

FORMATS = ("overlay", "palette", "scores", "cvat")


def results(folder: Path) -> dict[str, bytes]:
    files = all_files(folder)
    return {name: content for name, content in files.items() if not name.startswith(("run/", "reclip.json"))}


def made_files(run: Path) -> dict[str, bytes]:
    """The hypotheses and the shards of features of a run."""
    files = all_files(run)
    return {
        name: files[name]
        for name in files
        if name == "hypotheses.jsonl" or name.startswith("features/") and name.endswith(".safetensors")
    }


def test_without_ray(reclip, model, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    call = ("predict", "photos", "--model", "out", "--output", "x", "--device", "cpu")
    assert reclip(*call, "--engine", "ray").error == (
        "error: --engine ray needs the package Ray: pip install 'reclip_d2[ray]'"
    )
    assert "--workers: needs --engine ray" in reclip(*call, "--workers", "2").error
    assert "give one of them" in reclip(*call, "--engine", "ray", "--shard", "1/2").error
    assert "--workers 0" in reclip(*call, "--engine", "ray", "--workers", "0").error
    with pytest.raises(ReclipError, match="--engine spark is unknown"):
        engine_of("spark", None, None)
    assert not Path("x").exists()


@pytest.fixture
def cluster(monkeypatch):
    """A local cluster of two CPUs."""
    ray = pytest.importorskip("ray")
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def workers() -> list[int]:
    """Ids of the worker processes of this process's cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::MapWorker") and os.environ["RECLIP_CACHE"].encode() in environment:
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
def test_the_files_of_a_local_run_also_with_a_killed_worker(reclip, model, photos, cluster, tmp_path):
    torch.set_num_threads(1)
    (photos / "bad.png").write_bytes(b"not an image")
    for number in range(60):
        Image.fromarray(picture(100 + number, 60 + number, 90)).save(photos / f"more{number:02d}.png")
    call = ("predict", "photos", "--model", "out", "--device", "cpu", "--skip-broken", "--formats", *FORMATS)
    assert reclip(*call, "--output", "local").status == 0

    killed, seen = [], []

    def watch(event) -> None:
        if event.stage == "masks" and event.total:
            seen.append(event.done)
        if event.stage == "masks" and event.done >= 10 and not killed and (found := workers()):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])

    options = PredictOptions(device="cpu", formats=FORMATS, engine="ray", workers=2)
    result = PredictRun("photos", "out", tmp_path / "ray", options).predict(watch)
    assert killed and seen[-1] == 67 and seen == sorted(seen)
    assert result.made == 66 and list(result.problems) == ["bad"]
    assert results(tmp_path / "ray") == results(tmp_path / "local")
    lines = [line for line in (tmp_path / "ray" / "masks" / ".coverage.jsonl").read_text().splitlines() if line]
    assert len(lines) == 66  # none twice

    # Repeated, it finds everything; without some masks, it makes these.
    for name in ("more00", "in/4"):
        (tmp_path / "ray" / "masks" / f"{name}.png").unlink()
    again = reclip(*call, "--output", "ray", "--engine", "ray", "--workers", "2")
    assert again.status == 0 and "(2 new)" in again.out, again.err
    assert results(tmp_path / "ray") == results(tmp_path / "local")


@pytest.mark.slow
def test_urls(reclip, model, photos, cluster, tmp_path):
    """Workers fetch the images themselves."""
    call = ("predict", "--model", "out", "--device", "cpu", "--engine", "ray", "--workers", "2", "--skip-broken")
    (photos / "gone.csv").write_text(f"url\nfile://{photos}\nfile://{photos}/gone.png\n")
    result = reclip(*call[:1], photos / "gone.csv", *call[1:], "--output", "urls")
    assert result.status == 0 and "no mask of gone: image file://" in result.out, result.err
    masks = all_files(model / "masks")
    assert all_files(tmp_path / "urls" / "masks") == masks
    assert not (tmp_path / "urls" / "run" / "copies").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reclippp_shares", "reclippp_rectify"], ids=["dense", "windows"])
def test_segment_also_with_a_killed_worker(reclip, photos, classes, cluster, tmp_path, method, monkeypatch):
    """Hypotheses, features and masks are made by workers; one is killed while it makes the first two."""
    torch.set_num_threads(1)
    (photos / "bad.png").write_bytes(b"not an image")
    for number in range(140):
        Image.fromarray(picture(100 + number, 60 + number % 50, 90)).save(photos / f"more{number:03d}.png")
    arguments = ("--iterations", "3", "--keep", "best", "--method", method, "--skip-broken")
    views = ("FEATURE_STORE.VIEWS", "2", "FEATURE_STORE.KIND", "whole")
    monkeypatch.setattr(RunFolder, "remove_features", lambda folder: None)
    # Its masks of "dense" are made from the stored features, those of the workers from pixels.
    assert reclip(*segment_arguments(*arguments, keys=views, output="local")).status == 0

    killed, counts = [], {}

    def watch(event) -> None:
        if event.total:
            counts[event.stage] = (event.done, event.total)
        if event.stage in ("hypotheses", "features") and event.done >= 16 and not killed and (found := workers()):
            os.kill(found[0], signal.SIGKILL)
            killed.append(event.stage)

    for name in ("reclip_d2.features.store.FeatureStore._encode", "reclip_d2.hypothesis.generate._window_arrays"):
        monkeypatch.setattr(name, None)  # in this process; the workers import the package themselves
    options = SegmentOptions(
        device="cpu", clip="reclip-embedded", method=method, iterations=3, opts=(*FAST_KEYS, *views),
        engine="ray", workers=2,
    )  # fmt: skip
    result = SegmentRun("photos", "classes.txt", tmp_path / "ray", options).segment(watch)
    assert killed == ["features" if method == "reclippp_shares" else "hypotheses"]
    assert counts["features"] == (292, 292) and counts["hypotheses"] == (146, 146)
    assert result.masks == 146 and list(result.problems) == ["bad"]
    assert results(tmp_path / "ray") == results(tmp_path / "local")
    local, ray = (made_files(tmp_path / name / "run") for name in ("local", "ray"))
    assert ray == local and len(local) == 1 + -(-292 // 16)


def private_memory(process: int) -> float:
    """MiB that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@pytest.mark.slow
def test_memory_is_flat(model, cluster, tmp_path):
    """Of this process and of the workers; RECLIP_TEST_IMAGES sets the number of images."""
    count = int(os.environ.get("RECLIP_TEST_IMAGES", "4000"))
    write_images(tmp_path / "many", count, 64)
    memory: dict[str, list[float]] = {}

    def watch(event) -> None:
        if event.stage == "masks" and event.total:
            for name, done in (("warm", count // 5), ("end", count * 4 // 5)):  # before the workers are ended
                if event.done >= done and name not in memory:
                    memory[name] = [private_memory(process) for process in (os.getpid(), *workers())]

    keys = ("INPUT.MIN_SIZE_TEST", "64")
    options = PredictOptions(device="cpu", use="rectified", opts=keys, engine="ray", workers=2)
    assert PredictRun(tmp_path / "many", model, tmp_path / "masks", options).predict(watch).made == count
    growth = [end - warm for warm, end in zip(memory["warm"], memory["end"], strict=True)]
    print(
        f"{count} images: this process and the workers, MiB at a fifth {memory['warm']}, growth to four fifths {growth}"
    )
    assert max(growth) < 32.0


@pytest.mark.slow
def test_a_cluster_of_two_machines_that_loses_one(reclip, model, photos, tmp_path, monkeypatch):
    """The workers write nothing to the output folder, and a machine is lost with the masks that it has made."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    for number in range(200):
        Image.fromarray(picture(100 + number, 60 + number % 50, 90)).save(photos / f"more{number:03d}.png")
    call = ("predict", "photos", "--model", "out", "--device", "cpu")
    assert reclip(*call, "--output", "local").status == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        busy = []

        def watch(event) -> None:
            if event.stage == "masks" and event.done >= 20 and not busy:
                busy.extend(workers())
                cluster.remove_node(second, allow_graceful=False)

        result = PredictRun("photos", "out", tmp_path / "ray", PredictOptions(device="cpu", engine="ray")).predict(
            watch
        )
        assert len(busy) == 2 and result.made == 206 and not result.problems
        assert results(tmp_path / "ray") == results(tmp_path / "local")
    finally:
        sys.modules["ray"].shutdown()
        cluster.shutdown()


class Blocks(RayEngine):
    """An engine whose workers return what a test says, pass by pass."""

    def __init__(self, passes: list[list[str]]) -> None:
        self.passes, self.asked = passes, []

    def _started(self, job: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _rows(self, worker: object, job: object, items: list, largest: int):
        self.asked.append(([item["name"] for item in items], largest))
        for name in self.passes.pop(0):
            if name == "machine":
                raise LostBlocks("a machine is lost")
            problem = "image bad" if name.startswith("bad") else ""
            header = {"name": name, "problem": problem, "fatal": "", "pixels": {"0": 6}}
            yield header, {"index": png_bytes(np.zeros((2, 3), np.uint8))}


def test_lost_blocks_are_tried_again_and_rows_are_taken_once(tmp_path):
    names = ["a.jpg", "bad.jpg", "c.jpg", "kills.jpg"]
    images = [ImageFile(tmp_path / name, PurePosixPath(name)) for name in names]
    classes = ClassList(classes=(("sky",), ("wood",)), background=())
    job = MaskJob(None, "maskclip", classes, tmp_path / "none", False, ("index",), 1)
    engine = Blocks([["a.jpg", "bad.jpg", "a.jpg"], ["c.jpg"]])
    problems = write_masks(engine, job, images, tmp_path / "masks", tmp_path)
    assert engine.asked == [(names, LARGEST_BLOCK), (["c.jpg", "kills.jpg"], 1)]
    assert problems.pop("bad") == "image bad" and "its worker process ended 4 times" in problems.pop("kills")
    assert not problems and sorted(p.name for p in (tmp_path / "masks").glob("*.png")) == ["a.png", "c.png"]
    lines = [json.loads(x) for x in (tmp_path / "masks" / ".coverage.jsonl").read_text().split("\n") if x]
    assert lines == [{"image_id": name, "pixels": {"0": 6}} for name in ("a", "c")]
    assert write_masks(engine, job, [images[0], images[2]], tmp_path / "masks", tmp_path) == {}
    assert len(engine.asked) == 2

    # A lost machine takes finished rows with it: blocks of the same size are computed again, but not for ever.
    engine = Blocks([["a.jpg", "machine"], ["machine"], ["c.jpg"], ["kills.jpg"]])
    images = [image for image in images if image.image_id != "bad"]
    assert not write_masks(engine, job, images, tmp_path / "again", tmp_path)
    assert [largest for _, largest in engine.asked] == [LARGEST_BLOCK, LARGEST_BLOCK, LARGEST_BLOCK, 1]
    assert engine.asked[1][0] == ["c.jpg", "kills.jpg"]
    with pytest.raises(ReclipError, match=r"Ray has failed 5 times \(a machine is lost\): repeat the command"):
        write_masks(Blocks([["machine"]] * 5), job, images, tmp_path / "never", tmp_path)
