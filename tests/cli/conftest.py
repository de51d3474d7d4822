"""A folder of images, a class file, and the command, for the bundled tiny CLIP."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from reclip_d2.cli.main import main
from reclip_d2.data.datasets.custom import CUSTOM
from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]

CLASSES = "sky, heaven\nwood # not the forest\nfire\nbackground: road, snow\n"
# A run of seconds: few crops, one template, a few iterations.
FAST_KEYS = (
    "HYPOTHESIS.WINDOW_RATIO", "0.5", "MODEL.CLIP.TEMPLATES", "photo", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2",
)  # fmt: skip


def picture(seed: int, height: int = 96, width: int = 96) -> np.ndarray:
    """Blocks of colour ``(height, width, 3)`` uint8."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((16, 16, 1), np.uint8))[:height, :width]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of the command has done."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error's line; there must be one, the last of standard error, and no traceback."""
        assert self.status == 1, self.out + self.err
        assert "Traceback" not in self.err
        line = self.err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        return line


Reclip = Callable[..., Outcome]


def write_inputs(folder: Path) -> None:
    """``photos``: six images, of several sizes and in two folders; and ``classes.txt``."""
    photos = folder / "photos"
    (photos / "in").mkdir(parents=True)
    for number, size in enumerate([(96, 96), (96, 128), (70, 60), (200, 150)]):
        Image.fromarray(picture(number, *size)).save(photos / f"{number}.jpg", quality=95)
    for number in (4, 5):
        Image.fromarray(picture(number)).save(photos / "in" / f"{number}.png")
    (folder / "classes.txt").write_text(CLASSES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The images of :func:`write_inputs`."""
    if not (tmp_path / "photos").exists():
        write_inputs(tmp_path)
    return tmp_path / "photos"


@pytest.fixture
def classes(tmp_path: Path, photos: Path) -> Path:
    """The class file of :func:`write_inputs`."""
    return tmp_path / "classes.txt"


def segment_arguments(*arguments: object, keys: tuple = (), output: str = "out", images: tuple = ("photos",)) -> list:
    """``segment photos --classes classes.txt --output out ...`` with the tiny CLIP, for a run of seconds.

    Args:
        arguments: further ones.
        keys: further KEY VALUE pairs.
    """
    training = [] if "--fast" in arguments or "--iterations" in arguments else ["--iterations", "6"]
    if "--fast" not in arguments and "--keep" not in arguments:  # blocks of colour are nothing to judge by
        training += ["--keep", "rectified"]
    return [
        "segment", *images, "--classes", "classes.txt", "--output", output, "--clip", "reclip-embedded",
        "--device", "cpu", *training, *arguments, "--opts", *FAST_KEYS, *keys,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and ``out``, the finished run of :func:`segment_arguments`; tests change copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        patch.setenv("RECLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        main([str(argument) for argument in segment_arguments()])
    assert end.value.code == 0
    return folder


@pytest.fixture
def model(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, ``out`` in the test's folder, next to its inputs."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


@pytest.fixture
def reclip(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reclip:
    """Call the command in this process, in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Outcome(end.value.code, written.out, written.err)

    yield call
    for catalog in (DatasetCatalog, MetadataCatalog):
        if CUSTOM in catalog.list():
            catalog.remove(CUSTOM)


@pytest.fixture
def segment(reclip: Reclip, photos: Path, classes: Path) -> Reclip:
    """Call the command with :func:`segment_arguments`."""
    return lambda *arguments, **options: reclip(*segment_arguments(*arguments, **options))


def read_mask(path: Path) -> np.ndarray:
    """An index PNG; it must be one."""
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def all_files(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder that are not hidden, by their relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
