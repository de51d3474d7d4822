"""What a worker of ``--engine ray`` does with the items of a block; tests/cli/test_ray.py starts Ray."""

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.workspace import ray_masks
from reclip_d2.workspace.ray_engine import Worker
from reclip_d2.workspace.ray_masks import MaskWorker
from tests.cli.conftest import picture


class Job(NamedTuple):
    threads: int = 1
    error: str = ""


class Doubling(Worker):
    """Rows of twice the items' number; notes when items are read."""

    def prepare(self) -> None:
        if self.job.error:
            raise ReclipError(self.job.error)
        self.read_names: list[str] = []
        self.was_read = {name: threading.Event() for name in "abcd"}

    def read(self, item):
        self.read_names.append(item["name"])
        self.was_read[item["name"]].set()
        if item["number"] < 0:
            raise ReclipError("below 0")
        return 2 * item["number"]

    def row(self, item, source):
        following = chr(ord(item["name"]) + 1)
        assert following == "e" or self.was_read[following].wait(10)  # while this row is computed
        assert chr(ord(following) + 1) not in self.read_names  # one, not all: memory is bounded
        return {"double": source}, {"file": item["name"].encode()}


def items(*numbers: int) -> list[dict]:
    return [{"name": name, "number": number} for name, number in zip("abcd", numbers, strict=False)]


def test_one_item_is_read_ahead():
    rows = list(Doubling(Job()).answers(items(1, -1, 3, 4)))
    assert [header.get("double") for header, _ in rows] == [2, None, 6, 8]
    assert [header["problem"] for header, _ in rows] == ["", "below 0", "", ""]
    assert [files.get("file") for _, files in rows] == [b"a", None, b"c", b"d"]
    assert not any(header["fatal"] for header, _ in rows)
    assert list(Doubling(Job()).answers([])) == []


def test_a_worker_that_cannot_prepare_answers_so():
    rows = list(Doubling(Job(error="no weights")).answers(items(1, 2)))
    assert [(header["name"], header["fatal"]) for header, _ in rows] == [("a", "no weights"), ("b", "no weights")]


@pytest.mark.parametrize("large", [False, True])
def test_images_are_decoded_ahead_unless_they_are_large(tmp_path, monkeypatch, large):
    monkeypatch.setattr(ray_masks, "LARGE", 60 * 90 - large)
    pixels = picture(0, 60, 90)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    worker = MaskWorker.__new__(MaskWorker)
    worker._copies = tmp_path / "copies"
    for url in ("", f"file://{tmp_path}/a.png"):
        if url:
            pytest.importorskip("fsspec")
        path = tmp_path / "elsewhere" / "a.png" if url else tmp_path / "a.png"
        source = worker.read({"path": str(path), "name": "a.png", "url": url})
        assert isinstance(source, Path) == large
        np.testing.assert_array_equal(worker._decode(source) if large else source, pixels)
    assert (tmp_path / "a.png").exists() and not list((tmp_path / "copies").glob("*"))
