"""Blocks of scores: killed runs resume, processes share the work, other settings start over."""

import dataclasses
import io
import logging
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis import blocks as blocks_module
from reclip_d2.hypothesis import generate
from reclip_d2.hypothesis.blocks import ScoreBlocks
from reclip_d2.hypothesis.file import HypothesisHeader
from reclip_d2.hypothesis.generate import HypothesisGenerator, generate_hypotheses, load_or_generate

HEADER = HypothesisHeader("colours", [["red"], ["green"], ["blue"]], "stub", "0", "photo", "crops", 0.5)


class MeanColour:
    """A crop's global feature is its mean colour."""

    image_size = (8, 8)
    logit_scale = 10.0

    def __init__(self) -> None:
        self.crops = 0

    def global_features(self, crops: torch.Tensor) -> torch.Tensor:
        self.crops += len(crops)
        return F.normalize(crops.mean((2, 3)), dim=1)


def whole(arrays: dict, images: int) -> bool:
    """Blocks of the first tests hold anything."""
    return True


def generator() -> HypothesisGenerator:
    return HypothesisGenerator(MeanColour(), torch.eye(3), [0.0] * 3, [1.0] * 3, batch_size=9)


@pytest.fixture
def records(tmp_path, monkeypatch) -> list[dict]:
    """Five pictures of random columns, in blocks of two."""
    monkeypatch.setattr(blocks_module.ScoreBlocks.__init__, "__defaults__", (2,))
    rng = np.random.default_rng(0)
    result = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path)
        result.append({"file_name": str(path), "image_id": str(i)})
    return result


def test_blocks_cover_the_images_in_order(tmp_path):
    blocks = ScoreBlocks(tmp_path / "h.jsonl", list("abcde"), {}, size=2)
    assert [list(images) for images in blocks.images] == [[0, 1], [2, 3], [4]]
    assert blocks.missing(whole) == [0, 1, 2]
    blocks.write(1, {"scores": np.arange(4)})
    assert blocks.missing(whole) == [0, 2]
    assert blocks.read(1)["scores"].tolist() == [0, 1, 2, 3]
    blocks.remove()
    assert not blocks.folder.exists()


@pytest.mark.parametrize("change", [{"image_ids": list("abce")}, {"key": {"r": 2}}, {"size": 3}])
def test_other_settings_have_a_folder_of_their_own(tmp_path, change):
    usual = {"image_ids": list("abcd"), "key": {"r": 1}, "size": 2}
    assert ScoreBlocks(tmp_path / "h", **usual).folder != ScoreBlocks(tmp_path / "h", **{**usual, **change}).folder


@pytest.mark.parametrize("method", ["crops", "image"])
def test_a_stopped_run_goes_on(tmp_path, records, method):
    header = dataclasses.replace(HEADER, method=method)
    generate_hypotheses(generator(), records, header, tmp_path / "unbroken.jsonl")
    broken = [*records[:3], {**records[3], "file_name": str(tmp_path / "missing.png")}, records[4]]
    with pytest.raises(ReclipError, match="missing.png"):
        generate_hypotheses(generator(), broken, header, tmp_path / "h.jsonl")
    assert not (tmp_path / "h.jsonl").exists()

    second = generator()
    generate_hypotheses(second, records, header, tmp_path / "h.jsonl")
    # The first block of two images was done; three are left, of nine windows or one whole image each.
    assert second.backbone.crops == 3 * (9 if method == "crops" else 1)
    assert (tmp_path / "h.jsonl").read_text() == (tmp_path / "unbroken.jsonl").read_text()
    assert not list(tmp_path.glob("*.parts-*"))


def test_processes_share_the_blocks(tmp_path, records, monkeypatch):
    generate_hypotheses(generator(), records, HEADER, tmp_path / "alone.jsonl")
    monkeypatch.setattr(generate.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(generate.comm, "synchronize", lambda: None)
    # What the main process sees at the beginning, for both.
    monkeypatch.setattr(generate.comm, "all_gather", lambda seen: [[0, 1, 2]])
    crops = {}
    for rank in (1, 0):
        monkeypatch.setattr(generate.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(generate.comm, "is_main_process", lambda rank=rank: rank == 0)
        worker = generator()
        generate_hypotheses(worker, records, HEADER, tmp_path / "shared.jsonl")
        crops[rank] = worker.backbone.crops
    assert crops == {1: 2 * 9, 0: 3 * 9}  # block 1; blocks 0 and 2
    assert (tmp_path / "shared.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()


@pytest.mark.parametrize("damage", ["rubbish", "cut", "classes", "windows", "images", "kind", "array", "bomb"])
def test_a_damaged_block_is_made_again(tmp_path, records, damage):
    generate_hypotheses(generator(), records, HEADER, tmp_path / "unbroken.jsonl")
    blocks = ScoreBlocks(tmp_path / "h.jsonl", [r["image_id"] for r in records], dataclasses.asdict(HEADER))
    file = blocks.folder / "000001.npz"
    sound = {"size": np.ones((2, 2), int), "top1": np.ones((2, 9), int), "scores": np.ones((2, 9, 3), np.float16)}
    arrays = {
        "classes": {**sound, "scores": np.ones((2, 9, 4), np.float16)},
        "windows": {**sound, "top1": np.ones((2, 8), int)},
        "images": {name: array[:1] for name, array in sound.items()},
        "kind": {**sound, "top1": np.ones((2, 9))},
    }.get(damage, sound)
    blocks.write(1, arrays)
    if damage == "rubbish":
        file.write_bytes(b"PK rubbish")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif damage == "array":
        with open(file, "wb") as stream:
            np.save(stream, np.ones(3))
    elif damage == "bomb":  # a header that asks for a petabyte
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("scores.npy", head.getvalue())
    second = generator()
    generate_hypotheses(second, records, HEADER, tmp_path / "h.jsonl")
    assert second.backbone.crops == 5 * 9
    assert (tmp_path / "h.jsonl").read_text() == (tmp_path / "unbroken.jsonl").read_text()


def test_blocks_of_other_settings_go_when_the_file_is_there(tmp_path, records):
    path = tmp_path / "h.jsonl"
    other = ScoreBlocks(path, ["x"], {})
    other.write(0, {"scores": np.zeros(1)})
    (other.folder / ".000001.npz.0a1b2c3d.tmp.npz").touch()
    mine = tmp_path / "h.jsonl.parts-0123456789ab"
    mine.mkdir()
    (mine / "notes.txt").touch()
    (tmp_path / "h.jsonl.parts-of-mine").mkdir()
    lines = load_or_generate(path, HEADER, records, generator)
    assert len(lines) == 5 and not other.folder.exists()
    assert (mine / "notes.txt").exists() and (tmp_path / "h.jsonl.parts-of-mine").exists()


def test_two_runs_that_need_one_file(tmp_path, records, caplog):
    """One makes it, the other waits, and reads it."""
    caplog.set_level(logging.INFO)
    made, begun, go_on = [], threading.Event(), threading.Event()

    def slow_generator() -> HypothesisGenerator:
        made.append(1)
        begun.set()
        assert go_on.wait(30)
        return generator()

    def run() -> dict:
        return load_or_generate(tmp_path / "h.jsonl", HEADER, records, slow_generator)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run)
        assert begun.wait(30)
        second = pool.submit(run)
        while "waiting for another run" not in caplog.text:
            time.sleep(0.01)
        go_on.set()
        assert first.result(60) == second.result(60) and len(first.result()) == 5
    assert len(made) == 1
