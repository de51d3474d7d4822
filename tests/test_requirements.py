"""requirements.txt: the versions and hashes that ``make env`` installs."""

import functools
import importlib.metadata
import re
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
