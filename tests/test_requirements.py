"""requirements.txt: the versions and hashes that ``make env`` installs."""

import functools
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reclip_d2.install_detectron2.wheel import REQUIREMENTS as DETECTRON2_REQUIREMENTS

tomllib = pytest.importorskip("tomllib", reason="requirements.txt is for Python 3.11 and later")

ROOT = Path(__file__).parents[1]
# Extras that `make env` does not install; tests use stand-ins for them, or are skipped.
NOT_IN_THE_ENVIRONMENT = {"wandb", "mlflow", "completion", "ray"}
REMEDY = "make requirements.txt again (the command is in requirements.in)"


def _requirement_lines(path):
    """The requirements of a file: comments off, continued lines joined."""
    lines = re.sub(r"(?m)(^|\s+)#.*$", "", path.read_text()).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


@functools.cache
def _locked():
    """name -> (version, hashes) of requirements.txt."""
    locked = {}
    for line in _requirement_lines(ROOT / "requirements.txt"):
        text, *hashes = re.split(r"\s+--hash=", line.strip())
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, line
        name = canonicalize_name(requirement.name)
        assert name not in locked, f"{name} is there twice"
        locked[name] = (specifier.version, hashes)
    return locked


def _direct_requirements():
    """What the project's files ask for, the tests' packages included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    texts = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for name, extra in project["project"]["optional-dependencies"].items():
        if name not in NOT_IN_THE_ENVIRONMENT:
            texts += extra
    texts += [*_requirement_lines(ROOT / "requirements.in"), *DETECTRON2_REQUIREMENTS]
    return [Requirement(text) for text in texts]


def _requirements_of(name, version):
    """What an installed package asks for; nothing if it is not installed in this version."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Requirement(text) for text in distribution.requires or ()] if distribution.version == version else []


def test_every_package_has_one_version_and_hashes():
    locked = _locked()
    assert {"torch", "fvcore", "pytest"} <= set(locked)
    for name, (_, hashes) in locked.items():
        assert hashes, f"{name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), name
        assert len(set(hashes)) == len(hashes), name


def test_no_index_address_or_path():
    """The file is made where pip may be set up for other indexes; none of them is anybody else's business."""
    text = (ROOT / "requirements.txt").read_text()
    for unwanted in ("://", " @ ", "--index-url", "--extra-index-url", "--find-links", "/home/", "/opt/", "/tmp/"):
        assert unwanted not in text


@pytest.mark.parametrize("requirement", _direct_requirements(), ids=str)
def test_what_the_project_asks_for_is_there(requirement):
    name = canonicalize_name(requirement.name)
    locked = _locked()
    assert name in locked, REMEDY
    assert requirement.specifier.contains(locked[name][0], prereleases=True), REMEDY


def test_what_the_packages_ask_for_is_there():
    """The closure on this platform, by the metadata of the packages that are installed in the locked versions."""
    locked = _locked()
    todo = [(canonicalize_name(requirement.name), requirement.extras) for requirement in _direct_requirements()]
    done = set()
    while todo:
        name, extras = todo.pop()
        if (name, frozenset(extras)) in done:
            continue
        done.add((name, frozenset(extras)))
        for requirement in _requirements_of(name, locked[name][0]):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            needed = canonicalize_name(requirement.name)
            assert needed in locked, f"{name} needs {needed}: {REMEDY}"
            assert requirement.specifier.contains(locked[needed][0], prereleases=True), f"{name} needs {requirement}"
            todo.append((needed, requirement.extras))


def _interpreter(path, fails_at=0):
    """A program that passes ``-c`` on to Python and records calls of pip, with the text of the requirements file.

    Call number ``fails_at`` fails.
    """
    path.parent.mkdir(parents=True)
    record = path.parent / "calls.jsonl"
    path.with_name("pip.py").write_text(
        f"""
import json, sys
options, text = sys.argv[1:], ""
if "--requirement" in options:
    *options, _, requirements = options
    text = open(requirements).read()
with open({str(record)!r}, "a+") as file:
    file.write(json.dumps([options, text]) + "\\n")
    file.seek(0)
    sys.exit(3 if len(list(file)) == {fails_at} else 0)
"""
    )
    python = shlex.quote(sys.executable)
    pip = shlex.quote(str(path.with_name("pip.py")))
    path.write_text(f'#!/bin/sh\n[ "$1" != -m ] || {{ shift 2; exec {python} -S {pip} "$@"; }}\nexec {python} "$@"\n')
    path.chmod(0o755)
    return record


def test_the_large_packages_are_installed_in_separate_calls_of_pip(tmp_path):
    """A call of pip keeps all its downloads until it ends: CUDA's and PyTorch's must not be kept together."""
    record = _interpreter(tmp_path / "bin" / "python")
    subprocess.run(["bash", ROOT / "tools" / "install_pinned.sh", tmp_path / "bin" / "python"], check=True)
    options, texts = zip(*map(json.loads, record.read_text().splitlines()), strict=True)
    assert options == (
        ["install", "--require-hashes"],
        ["install", "--require-hashes", "--no-deps"],
        ["install", "--require-hashes", "--no-deps"],
        ["install", "--require-hashes", "--no-build-isolation"],
    )
    whole = (ROOT / "requirements.txt").read_text()
    assert texts[3] == whole
    names = [re.findall(r"(?m)^([^\s#=]+)==", text) for text in texts]
    assert names[0] == ["packaging", "setuptools", "wheel"] and names[2] == ["torch", "torchvision", "triton"]
    assert names[1] == [name for name in names[3] if name.split("-")[0] in ("nvidia", "cuda")]
    assert {"nvidia-cudnn-cu13", "cuda-toolkit"} <= set(names[1])
    for text in texts[:3]:  # each requirement with all its hashes, as in the whole file
        for block in re.findall(r"(?m)^[^\s#].*\n(?:[ ].*\n)*", text):
            assert "--hash=sha256:" in block and block in whole


@pytest.mark.parametrize(("owned", "calls"), [(True, 2), (False, 1)])
def test_a_failed_installation_says_what_disk_it_needs(tmp_path, owned, calls):
    state = tmp_path / "venv" / ".reclip_d2"
    record = _interpreter(tmp_path / "venv" / "bin" / "python", fails_at=calls)
    state.mkdir()
    (state / "venv").touch()  # the interpreter is done
    if owned:
        (state / "owned").touch()
        (tmp_path / "venv" / "lib" / "python3" / "site-packages").mkdir(parents=True)
    result = subprocess.run(
        ["make", "--silent", f"VENV={tmp_path / 'venv'}", state / "packages"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and not (state / "packages").exists()
    assert len(record.read_text().splitlines()) == calls
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    free = r"\(\d+\.\d GB free"
    assert re.search(rf"{re.escape(str(tmp_path))}/venv needs about 7 GB {free}\)", message), message
    assert re.search(rf"{re.escape(str(tmp_path))} {free}; TMPDIR sets", message), message
