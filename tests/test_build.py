"""setup.py: the flags that the extension is compiled with. Nothing is compiled here."""

import ctypes
import os
import runpy
import stat
import types
from pathlib import Path

import pytest
import setuptools
from setuptools.errors import LinkError

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def build(monkeypatch):
    """The names of setup.py, which is run without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for setting in ("FORCE_CPU", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):  # of whoever runs the tests
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("NO_EXTENSION", "1")
    names = runpy.run_path(str(SETUP))
    monkeypatch.delenv("NO_EXTENSION")
    return types.SimpleNamespace(**names)


def make_compiler(folder: Path, accepts: str) -> list[str]:
    """A compiler that makes an empty object file if its arguments contain ``accepts``, and fails otherwise."""
    program = folder / "compiler"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *"{accepts}"*) ;; *) exit 1 ;; esac\nfor last; do :; done\n: > "$last"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return [str(program)]


def copy_as_link(made: Path, library: Path) -> None:
    library.write_bytes(made.read_bytes())


def refuse_to_link(made: Path, library: Path) -> None:
    raise LinkError("undefined symbol")


@pytest.mark.parametrize(
    ("accepts", "flags"),
    [
        ("-fopenmp", ["-fopenmp"]),
        ("-Xpreprocessor -fopenmp", ["-Xpreprocessor", "-fopenmp"]),  # Apple's Clang
        ("no such flag", []),
    ],
)
def test_openmp_flags_are_those_that_the_compiler_takes(build, tmp_path, monkeypatch, accepts, flags):
    library = types.SimpleNamespace(reclip_probe=lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    assert build.openmp_flags(make_compiler(tmp_path, accepts), copy_as_link, tmp_path) == flags


def test_openmp_is_left_out_where_its_code_does_not_load(build, tmp_path):
    # An empty file is no library: CDLL raises OSError, as it does for Clang's code without Clang's OpenMP library.
    assert build.openmp_flags(make_compiler(tmp_path, "-fopenmp"), copy_as_link, tmp_path) == []
    assert build.openmp_flags(make_compiler(tmp_path, "-fopenmp"), refuse_to_link, tmp_path) == []


def test_the_language_standard_is_left_to_torch(build, monkeypatch):
    """Torch's headers need C++20 since 2.14, C++17 before: its builder adds the flag if it is missing."""
    monkeypatch.setenv("FORCE_CPU", "1")
    (extension,) = build.extensions()
    flags = extension.extra_compile_args
    assert not [flag for key in flags for flag in flags[key] if "std" in flag]
    assert "csrc/registration.cpp" in extension.sources
    assert not [source for source in extension.sources if source.endswith(".cu") or "_cuda" in source]


def test_a_missing_compiler_is_one_line(build, monkeypatch):
    monkeypatch.setenv("FORCE_CPU", "1")
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(SystemExit) as end:
        build.extensions()
    assert end.value.code == (
        "error: no C++ compiler (no-such-compiler -O3): install one, name it with CXX, or set NO_EXTENSION=1"
    )


def test_windows_is_served_by_plain_pytorch(build, monkeypatch, capsys):
    monkeypatch.setattr(build.sys, "platform", "win32")
    assert build.extensions() == []
    assert "Windows is not supported" in capsys.readouterr().out


def test_an_old_setuptools_is_one_line(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SETUP))
    assert str(end.value.code).startswith("error: setuptools 65.5.0 is too old: pip install --upgrade setuptools")


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("yes", True)])
def test_flags_of_the_environment(build, monkeypatch, value, expected):
    monkeypatch.setenv("FORCE_CUDA", value)
    assert build.flag("FORCE_CUDA") is expected
    assert os.environ["FORCE_CUDA"] == value
