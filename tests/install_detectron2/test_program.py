"""The program in different environments. No test touches the network or the environment."""

import hashlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2 import program as tool
from reclip_d2.install_detectron2.pip_settings import PipSettings
from tests.install_detectron2.sources import SOURCES, make_sdist

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The tool in an environment of our making: which detectron2 there is, which commands were run."""
    state = types.SimpleNamespace(origin=None, works=(True, "0.6 at /somewhere"), half=False, commands=[], fetched=[])
    find_spec = importlib.util.find_spec

    def fake_find_spec(name):
        if name != "detectron2":
            return find_spec(name)
        return None if state.origin is None else types.SimpleNamespace(origin=state.origin)

    def fake_run(command, **options):
        state.commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(tool.importlib.util, "find_spec", fake_find_spec)
    monkeypatch.setattr(tool, "importable", lambda: state.works)
    monkeypatch.setattr(tool, "is_half_installed", lambda origin: state.half)
    monkeypatch.setattr(tool.subprocess, "run", fake_run)
    monkeypatch.setattr(tool.PipSettings, "read", PipSettings)
    monkeypatch.setattr(tool, "fetch_file", lambda *wanted: state.fetched.append(wanted[1:]) or make_sdist(SOURCES))
    return state


def test_an_importable_detectron2_is_left_alone(world, capsys):
    world.origin = "/somewhere/detectron2/__init__.py"
    assert tool.main([]) == 0
    assert world.commands == []
    assert capsys.readouterr().out == "detectron2 0.6 at /somewhere is already installed\n"


def test_a_broken_detectron2_is_reported_and_not_touched(world, capsys):
    world.origin = "/somewhere/detectron2/__init__.py"
    world.works = (False, "ImportError: undefined symbol")
    assert tool.main([]) == 1
    assert world.commands == []
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: detectron2 at /somewhere/detectron2 cannot be imported (ImportError")


def test_missing_detectron2_is_fetched_by_hash_and_installed(world):
    assert tool.main([]) == 0
    digest = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
    assert world.fetched == [("detectron2-cdo", "detectron2_cdo-0.5.tar.gz", digest)]
    (install,) = world.commands
    assert install[-1].endswith("detectron2-0.5-py3-none-any.whl")
    assert "--force-reinstall" not in install


@pytest.mark.parametrize("force", [True, False])
def test_half_installed_or_forced_is_installed_again(world, force):
    world.origin = "/somewhere/detectron2/__init__.py"
    world.half = not force
    assert tool.main(["--force"] if force else []) == 0
    assert [("--force-reinstall" in command) for command in world.commands] == [True, False]


def test_wheel_dir_builds_and_installs_nothing(world, tmp_path):
    world.origin = "/somewhere/detectron2/__init__.py"
    assert tool.main(["--wheel-dir", str(tmp_path / "wheels")]) == 0
    assert (tmp_path / "wheels" / "detectron2-0.5-py3-none-any.whl").is_file()
    assert world.commands == []


def test_a_failed_download_is_one_line(world, monkeypatch, capsys):
    def fail(*wanted):
        raise ReclipError("cannot fetch it")

    monkeypatch.setattr(tool, "fetch_file", fail)
    assert tool.main([]) == 1
    assert capsys.readouterr().err == "error: cannot fetch it\n"
    assert world.commands == []


def test_an_archive_of_ones_own(world, tmp_path, monkeypatch, capsys):
    archive = tmp_path / "detectron2_cdo-0.5.tar.gz"
    assert tool.main(["--sdist", str(archive)]) == 1
    assert capsys.readouterr().err == f"error: --sdist {archive}: there is no such file\n"
    archive.write_bytes(b"abc")
    assert tool.main(["--sdist", str(archive)]) == 1
    # SHA-256 of "abc", from FIPS 180-2.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert f"is not detectron2_cdo-0.5.tar.gz: SHA-256 {digest}" in capsys.readouterr().err
    archive.write_bytes(make_sdist(SOURCES))
    monkeypatch.setattr(tool, "SDIST_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert tool.main(["--sdist", str(archive), "--wheel-dir", str(tmp_path)]) == 0
    assert world.fetched == []


def test_nothing_but_the_standard_library_is_imported():
    """It runs before the packages that reclip_d2 needs are installed."""
    lines = "import sys, reclip_d2.install_detectron2.program\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-S", "-c", lines], capture_output=True, text=True, cwd=ROOT, check=True)
    # __mp_main__ is another name that multiprocessing gives to __main__.
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) - {"__main__", "__mp_main__"} == {"reclip_d2"}


def test_half_installed_is_known_by_its_missing_metadata(tmp_path, monkeypatch):
    origin = tmp_path / "detectron2" / "__init__.py"
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda key: str(tmp_path))
    monkeypatch.setattr(tool.importlib.metadata, "files", lambda name: ["detectron2/__init__.py"])
    assert tool.is_half_installed(str(origin)) is False
    monkeypatch.setattr(tool.importlib.metadata, "files", lambda name: None)
    assert tool.is_half_installed(str(origin)) is True

    def missing(name):
        raise tool.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool.importlib.metadata, "files", missing)
    assert tool.is_half_installed(str(origin)) is True
    assert tool.is_half_installed("/elsewhere/detectron2/__init__.py") is False  # a source checkout on the path
