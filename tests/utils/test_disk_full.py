"""A file that does not fit on the disk: the error names it, and no part of it remains."""

import contextlib
import errno
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.export import torchscript_file
from reclip_d2.formats import IndexWriter, MaskClasses, Prediction
from reclip_d2.hypothesis.blocks import ScoreBlocks
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.tensor_files import save_archive, save_safetensors

LIMIT = 20_000


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may have more than LIMIT bytes; what is beyond fails as on a full disk.

    Not for a whole test: pytest's own output may go to a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def checkpoint(folder: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(LIMIT))

        def identity(self) -> dict:
            return {}

    ReclipCheckpointer(Model(), str(folder), save_to_disk=True).save("x")


def torchscript(folder: Path) -> None:
    with atomic_write(folder / "x.pt") as path:
        torchscript_file.write(torch.nn.Linear(200, 200), torch.zeros(1, 200), path, "{}")


def archive(folder: Path) -> None:
    with atomic_write(folder / "x.pth") as path:
        save_archive({"a": torch.zeros(LIMIT)}, path)


def safetensors(folder: Path) -> None:
    with atomic_write(folder / "x.safetensors") as path:
        save_safetensors({"a": torch.zeros(LIMIT)}, path)


def blocks(folder: Path) -> None:
    ScoreBlocks(folder / "h.jsonl", ["a"], {}).write(0, {"scores": np.zeros(LIMIT)})


def picture(folder: Path) -> None:
    with atomic_write(folder / "x.png") as path:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)).save(path)


def mask(folder: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 200, (300, 300)).astype(np.uint8)
    with IndexWriter(folder, MaskClasses.make([str(i) for i in range(200)])) as writer:
        from pathlib import PurePosixPath

        writer.add(Prediction(PurePosixPath("x.jpg"), labels))


@pytest.mark.parametrize(
    "write", [checkpoint, torchscript, archive, safetensors, blocks, picture, mask], ids=lambda f: f.__name__
)
def test_the_error_names_the_file(tmp_path, write):
    with pytest.raises(OSError) as caught, small_files():
        write(tmp_path)
    assert caught.value.errno in (errno.EFBIG, errno.EIO) and caught.value.strerror
    assert Path(caught.value.filename).name in ("x.pth", "x.pt", "x.safetensors", "000000.npz", "x.png")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "classes.json"]


def test_what_fits_is_whole(tmp_path):
    with small_files(), atomic_write(tmp_path / "x.pth") as path:
        save_archive({"a": torch.arange(9.0)}, path)
    assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=True)["a"], torch.arange(9.0))


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "x.json") as path:
        path.write_text(json.dumps(json.loads((tmp_path / "missing.json").read_text())))
    assert caught.value.filename == str(tmp_path / "missing.json")
