"""Blocks of scores: a killed run goes on, processes share, another setting begins anew."""

import dataclasses
import json

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
from reclip_d2.hypothesis.generate import HypothesisGenerator, generate_hypotheses

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
    assert blocks.missing() == [0, 1, 2]
    blocks.write(1, {"scores": np.arange(4)})
    assert blocks.missing() == [0, 2]
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


def test_a_damaged_block_is_made_anew(tmp_path, records):
    blocks = ScoreBlocks(tmp_path / "h.jsonl", [r["image_id"] for r in records], dataclasses.asdict(HEADER))
    blocks.folder.mkdir()
    (blocks.folder / "000000.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ReclipError, match="again"):
        generate_hypotheses(generator(), records, HEADER, tmp_path / "h.jsonl")
    generate_hypotheses(generator(), records, HEADER, tmp_path / "h.jsonl")
    lines = (tmp_path / "h.jsonl").read_text().splitlines()
    assert [json.loads(line)["image_id"] for line in lines[1:]] == ["0", "1", "2", "3", "4"]
