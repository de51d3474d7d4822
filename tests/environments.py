"""Separate Python environments for libraries that conflict with the project's requirements."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


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


def run_program(python: Path, program: Path, *arguments: object, folder: Path) -> str:
    """Run a program with an environment's Python, without this one's modules; returns its standard output.

    ``folder`` is its working folder and home. The test fails if the program does.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(python), str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "HOME": str(folder)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
