"""docs/how_to_add.md: its blocks, applied to a copy of the package, give a head, attention, loss, data set and format
that train, evaluate and write."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/how_to_add.md"


def blocks() -> list[tuple[str, str, str]]:
    """(language, path, text) of each fenced block that names a file; blocks of a numbered list are indented."""
    pattern = r'^( *)```(\w+) title="([^"]+)"\n(.*?)^\1```$'
    found = re.findall(pattern, PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [
        (language, path, "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True)))
        for indent, language, path, text in found
    ]


def apply(text: str, diff: str) -> str:
    """``text`` with a diff applied: its lines without ``+`` must occur in it once, together."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(before) == 1, f"not once in the file:\n{before}"
    return text.replace(before, after)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the repository with all blocks of the page applied."""
    root = tmp_path / "checkout"
    for folder in ("reclip_d2", "configs", "datasets"):
        ignored = shutil.ignore_patterns("embedded*" if folder == "datasets" else "", "*.so")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored, symlinks=True)
    for extension in (ROOT / "reclip_d2").rglob("*.so"):
        (root / extension.relative_to(ROOT)).symlink_to(extension)
    for file in ("train_net.py", "pyproject.toml", "docs/formats.md"):
        (root / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    for language, path, text in blocks():
        file = root / path
        assert file.exists() == (language == "diff"), path
        file.write_text(apply(file.read_text(encoding="utf-8"), text) if language == "diff" else text, encoding="utf-8")
    return root


def make_farmland(folder: Path) -> None:
    """Two halves a scene: lawn below sky, labelled 1 and 3."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for k in range(count):
            pixels = generator.integers(0, 40, (96, 96, 3)).astype(np.uint8)
            pixels[:48] += np.array([90, 150, 210], np.uint8)
            pixels[48:] += np.array([40, 140, 30], np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{k}.jpg")
            label = np.full((96, 96), 1, np.uint8)
            label[:48] = 3
            label[40:48, :20] = 2
            Image.fromarray(label).save(folder / "labels" / split / f"{k}.png")


PROGRAM = """
import runpy, sys
from pathlib import Path, PurePosixPath

import numpy as np

sys.argv = ["prepare_farmland.py", "--workers", "1"]
runpy.run_path("datasets/prepare_farmland.py", run_name="__main__")

from reclip_d2.engine.program import argument_parser, main
main(argument_parser().parse_args([
    "--config-file", "configs/datasets/farmland.yaml",
    "--config-file", "configs/methods/reclippp_rectify.yaml", "MODEL.BIAS_HEAD.NAME", "ClassBiasHead",
    "MODEL.CLIP.DENSE_ATTENTION", "local_mean", "MODEL.CLIP.LOCAL_MEAN_SIZE", "5", "MODEL.LOSS.ENTROPY_WEIGHT", "0.1",
    "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2",
    "DATALOADER.NUM_WORKERS", "0",
]))

from reclip_d2 import formats
from reclip_d2.formats import FORMATS, MaskClasses, Prediction
with FORMATS["shares"](Path("shares"), MaskClasses.make(["a", "b"])) as writer:
    writer.add(Prediction(PurePosixPath("x/1.jpg"), np.array([[0, 0], [1, 255]], np.uint8)))
    writer.finish()
assert "``shares``" in formats.__doc__

import torch
from reclip_d2.backbones.dense_attention.local_mean import LocalMeanAttention

assert set(LocalMeanAttention().identity()) < set(LocalMeanAttention(5).identity())
class Block:
    norm = values = output = staticmethod(lambda x: x)
class Inputs:  # a row of patches, the last one padding
    block, grid = Block, (1, 4)
    patches = torch.tensor([[[1.0], [2.0], [6.0], [100.0]]])
    valid = torch.tensor([[True, True, True, False]])
assert LocalMeanAttention().forward(Inputs)[0, :3, 0].tolist() == [1.5, 3.0, 4.0]
"""


def test_the_recipes_work_together(checkout, tmp_path):
    datasets = tmp_path / "datasets"
    make_farmland(datasets / "Farmland")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=checkout,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "DETECTRON2_DATASETS": str(datasets),
            "RECLIP_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for command in (["check"], ["format", "--check"]):
        lint = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=checkout, capture_output=True, text=True, check=False
        )
        assert lint.returncode == 0, lint.stdout
    assert "`shares`" in (checkout / "docs/formats.md").read_text(encoding="utf-8")
    run = checkout / "output/farmland/reclippp_rectify"
    metrics = (run / "metrics.json").read_text(encoding="utf-8")
    assert "loss_entropy" in metrics and "loss_contrastive" in metrics
    assert "mIoU" in (run / "log.txt").read_text(encoding="utf-8")
    assert (checkout / "shares/x/1.txt").read_text(encoding="utf-8") == "a\t50.00\nb\t25.00\n"
