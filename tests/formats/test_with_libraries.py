"""Round trips by the tools' own libraries, each installed in a separate environment."""

from pathlib import Path

import pytest

from tests.environments import make_environment, run_program
from tests.formats.read_with_libraries import LIBRARIES, PACKAGES
from tests.formats.sample import write_sample

# ultralytics installs PyTorch, gigabytes: run read_with_libraries.py by hand for it.
_TESTED = [name for name in LIBRARIES if name != "ultralytics"]


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
    run_program(python, program, library, sample, folder=tmp_path)
