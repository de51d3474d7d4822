"""GeoTIFFs at URLs: which are, and that windows alone are read of them."""

from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.geotiff import SceneReading
from reclip_d2.data.image_folder import find_images
from reclip_d2.data.scene_files import mark_scenes, open_scene_file
from reclip_d2.errors import ReclipError
from reclip_d2.utils.progress import report_to
from tests.geotiffs import write_geotiff
from tests.range_server import serving_ranges

pytest.importorskip("rasterio")
fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def values():
    """Noise, which does not compress: 3 x 900 x 1000 bytes."""
    return np.random.default_rng(0).integers(0, 256, (3, 900, 1000), dtype=np.uint8)


@pytest.fixture(scope="module")
def cog(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("cog") / "cog.tif"
    return write_geotiff(path, values, driver="COG", blocksize=128, compress="deflate").read_bytes()


@pytest.fixture
def server(cog, tmp_path):
    with serving_ranges() as server:
        server.files["in/cog.tif"] = cog
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "plain.tif")
        server.files["plain.tif"] = (tmp_path / "plain.tif").read_bytes()
        yield server


@pytest.fixture
def find(tmp_path):
    """The images at URLs, with GeoTIFFs marked, by name."""

    def run(*urls):
        found = mark_scenes(find_images(urls, copies=tmp_path / "copies"))
        return {image.name.name: image for image in found.images}

    return run


@pytest.mark.parametrize("ranges", [True, False])
def test_which_are_geotiffs(server, find, ranges):
    server.ranges = ranges
    urls = [f"{server.address}/{name}" for name in ("in/cog.tif", "plain.tif", "gone.tif", "other.png")]
    images = find(*urls)
    assert images["cog.tif"].scene_size == (900, 1000) and str(images["cog.tif"].mask_name) == "in/cog.tif"
    assert [images[name].scene_size for name in ("plain.tif", "gone.tif", "other.png")] == [None] * 3
    assert not images["cog.tif"].path.exists()


def test_a_directory_at_the_end_of_a_file_that_is_sent_as_a_whole(server, find, cog):
    """The first directory is behind 6 MB."""
    (place,) = np.frombuffer(cog[4:8], "<u4")
    assert cog[:4] == b"II*\0"
    moved = bytearray(cog.ljust(6_000_000, b"\0") + cog[place : place + 4000])
    moved[4:8] = np.uint32(6_000_000).tobytes()
    server.files["moved.tif"] = bytes(moved)
    for server.ranges in (True, False):
        assert find(f"{server.address}/moved.tif")["moved.tif"].scene_size == (900, 1000)


def test_a_window_is_read_alone(server, find, values, cog):
    image = find(f"{server.address}/in/cog.tif?key=1")["cog.tif"]
    server.sent.clear()
    with open_scene_file(image, SceneReading()) as scene:
        assert scene.shape == (900, 1000, 3) and scene.dataset.crs.to_epsg() == 32633
        found = scene.window(slice(500, 560), slice(700, 800))
    assert (found == values[:, 500:560, 700:800].transpose(1, 2, 0)).all()
    assert 0 < sum(server.sent) < len(cog) / 3, (server.sent, len(cog))
    assert not image.path.exists()


@pytest.mark.parametrize("name", ["my scene.tif", "my%20scene.tif", "größe (1)+2.tif"])
def test_names_that_are_quoted_in_urls(server, find, cog, name):
    server.files[unquote(name)] = cog
    (image,) = find(f"{server.address}/{name}").values()
    with open_scene_file(image, SceneReading()) as scene:
        assert scene.shape == (900, 1000, 3)
    assert not image.path.exists()


def test_a_server_without_ranges(server, find, values, cog):
    server.ranges = False
    image = find(f"{server.address}/in/cog.tif")["cog.tif"]
    messages = []
    with report_to(lambda event: messages.append(str(event))), open_scene_file(image, SceneReading()) as scene:
        assert (scene.window(slice(0, 9), slice(0, 9)) == values[:, :9, :9].transpose(1, 2, 0)).all()
    assert image.path.read_bytes() == cog
    (line,) = [message for message in messages if "cog.tif" in message and "fetch" not in message]
    assert "/in/cog.tif is copied as a whole, since its server does not send parts of files" in line
    server.files.clear()  # the copy is used from now on
    with open_scene_file(image, SceneReading()) as scene:
        assert scene.shape == (900, 1000, 3)


def test_other_stores_through_fsspec(find, values, cog):
    memory = fsspec.filesystem("memory")
    memory.pipe("/scenes/in/cog.tif", cog)
    try:
        image = find("memory://scenes/in/cog.tif")["cog.tif"]
        with open_scene_file(image, SceneReading()) as scene:
            found = scene.window(slice(1, 5), slice(2, 9))
        assert (found == values[:, 1:5, 2:9].transpose(1, 2, 0)).all() and not image.path.exists()
    finally:
        memory.rm("/scenes", recursive=True)


def test_errors_are_one_line(server, find):
    image = find(f"{server.address}/in/cog.tif?other")["cog.tif"]
    failing = pytest.raises(ReclipError, match=r"image http\S*cog.tif\S* cannot be read \(.+\): check the URL and your")
    with failing as while_reading, open_scene_file(image, SceneReading()) as scene:
        server.fails_from = 400_000
        scene.window(slice(0, 900), slice(0, 1000))
    with failing as refused, open_scene_file(image, SceneReading()):
        pass
    server.files.clear()
    gone = pytest.raises(ReclipError, match=r"cog.tif\S* does not exist: check the URL")
    with gone, open_scene_file(image, SceneReading()):
        pass
    server.shutdown()
    server.server_close()
    with failing as unreachable, open_scene_file(image, SceneReading()):
        pass
    assert "403" in str(refused.value) and "onnect" in str(unreachable.value)
    assert not any("\n" in str(error.value) for error in (while_reading, refused, unreachable))
