"""Images in S3, read through s3fs from an emulator on this machine."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reclip_d2.data.image_folder import find_images
from reclip_d2.data.remote_images import fetch_images
from reclip_d2.errors import ReclipError
from tests.cli.conftest import all_files
from tests.environments import make_environment

fsspec = pytest.importorskip("fsspec")
NAMES = ["a.jpg", "in/b b.png", "in/q?#1%20.png", "größe.png"]


class Emulator(NamedTuple):
    """An emulator of S3 on the loopback."""

    address: str
    python: Path
    """Of an environment with moto and s3fs."""

    def refuse_after(self, requests: str) -> None:
        """Refuse the test's credentials after so many requests."""
        url, kind = f"{self.address}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), kind, method="POST")).close()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Iterator[Emulator]:
    """A running emulator; s3fs can be imported, and finds it in the environment's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if "RECLIP_TEST_S3" in os.environ:  # the Python of an environment that exists
        python = Path(os.environ["RECLIP_TEST_S3"])
    else:  # not a newer s3fs, which would need a newer fsspec
        packages = (f"s3fs<={fsspec.__version__}", "moto[s3,server]")
        python = make_environment(tmp_path_factory.mktemp("s3") / "environment", packages)
    emulator = Emulator(f"http://127.0.0.1:{port}", python)
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    variables = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = copy.deepcopy(fsspec.config.conf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(packages)])  # last: this environment's own packages are used
        for name, value in {**variables, "FSSPEC_S3_ENDPOINT_URL": emulator.address}.items():
            patch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)  # as when fsspec is imported
        command = [str(python.with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(port, server)
            yield emulator
        finally:
            server.terminate()
            server.wait(30)
            fsspec.config.conf.clear()
            fsspec.config.conf.update(before)


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Wait until a server listens."""
    for _ in range(600):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the emulator has ended"
        time.sleep(0.2)
    raise TimeoutError("the emulator does not listen")


def new_bucket(name: str) -> Any:
    """The file system, with a bucket that did not exist."""
    system = fsspec.filesystem("s3")
    system.mkdir(name)
    return system


def message_of(*sources: str, copies: Path) -> str:
    """The line that says why images cannot be found or copied."""
    try:
        problems = fetch_images(find_images(sources, copies=copies).images)
    except ReclipError as error:
        problems = {"": str(error)}
    (message,) = problems.values()
    assert "\n" not in message
    return message


@pytest.mark.slow
def test_images_of_a_bucket(emulator, tmp_path):
    system = new_bucket("pictures")
    for name in [*NAMES, ".hidden.png", "notes.md"]:
        system.pipe_file(f"pictures/set/{name}", name.encode())
    system.pipe_file("pictures/set/list.csv", b"path\nin/b b.png\na.jpg\n")
    system.pipe_file("pictures/setting/other.png", b"of another folder")
    system.invalidate_cache()

    images = find_images(["s3://pictures/set"], copies=tmp_path).images
    assert sorted(str(image.name) for image in images) == sorted(NAMES)
    assert fetch_images(images) == {}
    assert {str(image.name): image.path.read_bytes().decode() for image in images} == {name: name for name in NAMES}
    for source, expected in {
        "set/": sorted(NAMES),
        "set/*.jpg": ["a.jpg"],
        "set/**/*.png": sorted(NAMES[1:]),
        "set/list.csv": ["a.jpg", "in/b b.png"],
        "set/a.jpg": ["a.jpg"],
    }.items():
        found = find_images([f"s3://pictures/{source}"], copies=tmp_path / "copies").images
        assert sorted(str(image.name).removeprefix("set/") for image in found) == expected, source


@pytest.mark.slow
def test_errors_are_one_line(emulator, tmp_path):
    system = new_bucket("shown")
    system.pipe_file("shown/notes.md", b"text")
    url = "s3://shown/gone.jpg"
    assert message_of(url, copies=tmp_path) == f"image {url} does not exist: check the URL"
    assert "shown/nothing has no images" in message_of("s3://shown/nothing", copies=tmp_path)
    for source in ("no-such-bucket", "no-such-bucket/x/"):
        message = message_of(f"s3://{source}", copies=tmp_path)
        assert f"IMAGES s3://{source} " in message and message.endswith(": check the URL")
    assert "does not exist: check the URL" in message_of("s3://no-such-bucket/x.csv", copies=tmp_path)


@pytest.mark.slow
def test_a_refused_access(emulator, tmp_path):
    system = new_bucket("private")
    system.pipe_file("private/a.jpg", b"A")
    emulator.refuse_after("0")
    fsspec.filesystem("s3").invalidate_cache()
    try:
        for source in ("private", "private/a.jpg"):
            message = message_of(f"s3://{source}", copies=tmp_path)
            assert f"s3://{source} cannot be read (" in message and message.endswith(": check the URL and your access")
    finally:
        emulator.refuse_after("inf")


@pytest.mark.slow
def test_the_masks_of_local_images(emulator, reclip, model, photos, tmp_path):
    system = new_bucket("photos")
    for path in photos.rglob("*.*"):
        system.pipe_file(f"photos/{path.relative_to(photos)}", path.read_bytes())
    system.invalidate_cache()
    arguments = ("--model", "out", "--device", "cpu", "--output")
    result = reclip("predict", "s3://photos", *arguments, "remote")
    assert result.status == 0, result.err
    assert reclip("predict", "photos", *arguments, "local").status == 0
    assert all_files(tmp_path / "remote" / "masks") == all_files(tmp_path / "local" / "masks")
    refused = reclip("predict", "photos", *arguments[:-1], "--output", "s3://photos/masks")
    assert "is a URL: name a local path, and copy it from there" in refused.error
