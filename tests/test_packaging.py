"""Content of an installed package: the command ``reclip``, and the configs and the trainer that it needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_has_what_the_command_needs(tmp_path):
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("reclip_d2", "configs", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    pip = [sys.executable, "-m", "pip"]
    environment = {**os.environ, "NO_EXTENSION": "1"}
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(checkout)],
        check=True,
        capture_output=True,
        env=environment,
    )
    (wheel,) = tmp_path.glob("reclip_d2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "reclip_d2/train_net.py",
        "reclip_d2/configs/Base-ReCLIP.yaml",
        "reclip_d2/configs/datasets/custom-reclip-embedded.yaml",
        "reclip_d2/configs/methods/reclippp_rectify.yaml",
        "reclip_d2/cli/main.py",
        "reclip_d2/install_detectron2/__main__.py",
        "reclip_d2/backbones/assets/reclip-embedded.safetensors",
        "reclip_d2/backbones/assets/reclip-embedded-longtail.safetensors",
    } <= names
    templates = {str(path.relative_to(ROOT)) for path in ROOT.glob("reclip_d2/**/*.jinja")}
    assert templates and templates <= names

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    lines = (
        "import reclip_d2, reclip_d2.workspace.training as training, reclip_d2.config.files as files\n"
        "print(reclip_d2.__file__, training.__file__, files.configs_folder())"
    )
    result = subprocess.run(
        [sys.executable, "-c", lines],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(site)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(path).is_relative_to(site) for path in result.stdout.split())
    program = subprocess.run(
        [str(site / "bin" / "reclip"), "--help"],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(site)},
        check=True,
    )
    assert "segment" in program.stdout and "doctor" in program.stdout

    empty = tmp_path / "empty"
    empty.mkdir()
    evaluation = subprocess.run(
        [
            *(sys.executable, "-m", "reclip_d2.train_net", "--config-file", "configs/datasets/embedded.yaml"),
            *("--config-file", "configs/methods/maskclip.yaml"),
            *("--eval-only", "DATALOADER.NUM_WORKERS", "0"),
        ],
        capture_output=True,
        text=True,
        cwd=empty,
        env={**environment, "PYTHONPATH": str(site), "DETECTRON2_DATASETS": str(empty)},
        check=False,
    )
    assert evaluation.returncode == 0, evaluation.stderr
    (folder,) = (path for path in empty.iterdir() if path.name == "output")
    assert "mIoU" in (folder / "embedded" / "maskclip" / "log.txt").read_text()
    installer = subprocess.run(
        [sys.executable, "-m", "reclip_d2.install_detectron2"],
        capture_output=True,
        text=True,
        cwd=empty,
        env={**environment, "PYTHONPATH": str(site)},
        check=True,
    )
    assert installer.stdout.endswith("is already installed\n")
