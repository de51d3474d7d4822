"""A served session of the page with the tiny CLIP, and a bias trained through the page."""

from __future__ import annotations

import dataclasses
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.app.session import Session
from reclip_d2.data.datasets.custom import CUSTOM
from reclip_d2.workspace.stage_config import ClipChoice
from tests.cli.conftest import FAST_KEYS, write_inputs
from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]

CLASSES = "sky, heaven\nwood\nfire\nbackground: road, snow"
TINY = ClipChoice("reclip-embedded", "openai", "cpu", FAST_KEYS)


@dataclasses.dataclass(frozen=True)
class Served:
    """The page of a session.

    Attributes:
        client: of gradio, which talks HTTP with it.
        photos: a folder with images, a broken one, and one in a subfolder.
        learnt: what the page said when the bias was learnt.
    """

    session: Session
    address: str
    client: Any
    photos: Path
    learnt: str


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page on a free port, on which the bias of :data:`CLASSES` was learnt from four images."""
    from gradio_client import Client, handle_file

    from reclip_d2.app.server import check_gradio, serve

    folder = tmp_path_factory.mktemp("page")
    write_inputs(folder)
    photos = folder / "photos"
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "in" / "0.jpg").write_bytes((photos / "1.jpg").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR"):
            patch.setenv(name, "")  # given back at the end
        patch.setenv("RECLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        # gradio sends files below the working directory and the temporary folder unasked: ours shall lie elsewhere.
        (folder / "temporary").mkdir()
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        check_gradio()
        session = Session(TINY, None, folder / "work")
        with serve(session, "127.0.0.1", free_port()) as address:
            downloads = str(folder / "downloads")
            client = Client(address, verbose=False, download_files=downloads, httpx_kwargs={"timeout": 300})
            names = ("0.jpg", "1.jpg", "broken.jpg", "in/0.jpg", "in/4.png")
            client.predict([handle_file(str(photos / name)) for name in names], api_name="/upload")
            learnt = client.predict(CLASSES, 4, api_name="/learn")
            yield Served(session, address, client, photos, learnt)
    for catalog in (DatasetCatalog, MetadataCatalog):
        if CUSTOM in catalog.list():
            catalog.remove(CUSTOM)


@pytest.fixture
def session(served: Served) -> Session:
    """The session of :func:`served`."""
    return served.session
