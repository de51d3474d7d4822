"""The server of the cases, and the finished run that many of them start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import segment_arguments, write_inputs
from tests.hostile.driver import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The process that runs the programs."""
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def finished(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and ``out``, a finished run; cases get copies."""
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder)
    answer, _, err = server.call("reclip", segment_arguments(), folder, {"RECLIP_CACHE": str(folder / "cache")})
    assert answer["status"] == 0, err
    return folder
