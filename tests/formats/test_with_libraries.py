"""Round trips by the tools' own libraries, each installed in a separate environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats.read_with_libraries import LIBRARIES, PACKAGES
from tests.formats.sample import write_sample

# ultralytics installs PyTorch, gigabytes: run read_with_libraries.py by hand for it.
_TESTED = [name for name in LIBRARIES if name != "ultralytics"]


def make_environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """An environment with the packages, made by uv or pip; returns its Python. Skips the test where they cannot be
    installed."""
    python = folder / "bin" / "python"
    if uv := shutil.which("uv"):
        create = [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    else:
        create = [sys.executable, "-m", "venv", str(folder)]
        install = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1"]
    subprocess.run(create, check=True, capture_output=True, timeout=120)
    wanted = [*packages, "numpy", "Pillow"]
    try:
        subprocess.run([*install, *wanted], check=True, capture_output=True, text=True, timeout=600)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        pytest.skip(f"{', '.join(packages)} cannot be installed: {lines[-1] if lines else error}")
    except subprocess.TimeoutExpired:
        pytest.skip(f"{', '.join(packages)} took more than 10 minutes to install")
    return python


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Every format of the sample."""
    folder = tmp_path_factory.mktemp("libraries")
    write_sample(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("library", _TESTED)
def test_a_library_sees_the_masks(library, sample, tmp_path):
    python = make_environment(tmp_path / "environment", PACKAGES.get(library, (library,)))
    program = Path(__file__).with_name("read_with_libraries.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(python), str(program), library, str(sample)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
