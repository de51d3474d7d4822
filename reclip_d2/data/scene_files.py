"""GeoTIFFs among a user's images: which are, and how they are opened, in this file system or at a URL.

At a URL, only the parts of the file that a window needs are read: over HTTP by GDAL, from other stores by fsspec.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from reclip_d2.data.geo_header import EXTENSIONS, geotiff_size, read_geo_header
from reclip_d2.data.geotiff import Scene, SceneReading, gdal, open_dataset, open_scene
from reclip_d2.data.image_folder import FoundImages, ImageFile
from reclip_d2.data.remote_images import HTTP, fetch, load_fsspec, naming_url, stream_options, url_path
from reclip_d2.utils.files import display_path
from reclip_d2.utils.progress import say

_THREADS = 8
_BLOCK = 1 << 18  # bytes of one request for a header
_IN_URLS = "%/:?#[]@!$&'()*+,;=~"  # left as they are; GDAL does not quote spaces and the like, as fsspec does
_GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no search for files next to the image
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",  # bytes per second, over so many seconds:
    "GDAL_HTTP_LOW_SPEED_TIME": "60",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "1",
}


def mark_scenes(found: FoundImages) -> FoundImages:
    """The images, with the size of those that are GeoTIFFs; of TIFFs at URLs the beginning is read."""
    remote = [image for image in found.images if image.url and url_path(image.url).suffix.lower() in EXTENSIONS]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip((image.url for image in remote), pool.map(_remote_size, remote), strict=True))
    images = []
    for image in found.images:
        size = sizes.get(image.url) if image.url else geotiff_size(image.path)
        images.append(image if size is None else dataclasses.replace(image, scene_size=size))
    return dataclasses.replace(found, images=images)


def _remote_size(image: ImageFile) -> tuple[int, int] | None:
    """(H, W) of a GeoTIFF at a URL; None for another file, and one that cannot be read, which is reported later."""
    if image.path.exists():
        return geotiff_size(image.path)
    for options in ({"block_size": _BLOCK}, stream_options(image.url)):
        try:
            system, path = load_fsspec().core.url_to_fs(image.url)
            with system.open(path, "rb", **options) as stream:
                return read_geo_header(stream)
        except ValueError:  # the server sends no parts of files
            continue
        except Exception:  # every file system has errors of its own
            return None
    return None


@contextlib.contextmanager
def open_scene_file(image: ImageFile, reading: SceneReading) -> Iterator[Scene]:
    """Open a GeoTIFF. At a URL, from a server that does not send parts of files, it is first copied as a whole.

    Raises:
        ReclipError: see :func:`~reclip_d2.data.geotiff.open_scene`; the URL cannot be reached.
    """
    if image.url and not image.path.exists():
        if _sends_parts(image.url):
            with _open_url(image, reading) as scene:
                yield scene
            return
        say("images", f"{display_path(image.url)} is copied as a whole, since its server does not send parts of files")
        fetch(image.url, image.path)
    with open_scene(image.path, reading) as scene:
        yield scene


def _sends_parts(url: str) -> bool:
    """Whether the last byte of a file can be read alone.

    Raises:
        ReclipError: the file does not exist, or cannot be reached.
    """
    with naming_url(url, f"image {display_path(url)}"):
        system, path = load_fsspec().core.url_to_fs(url)
        try:
            with system.open(path, "rb", block_size=_BLOCK, cache_type="none") as stream:
                stream.seek(-1, 2)
                return len(stream.read(1)) == 1
        except ValueError:  # a stream, or fsspec's error about the server
            return False


@contextlib.contextmanager
def _open_url(image: ImageFile, reading: SceneReading) -> Iterator[Scene]:
    name = f"image {display_path(image.url)}"
    options: dict[str, Any] = {}
    place = f"/vsicurl/{quote(image.url, safe=_IN_URLS)}"
    if image.url.partition("://")[0].lower() not in HTTP:
        options["opener"], place = load_fsspec().core.url_to_fs(image.url)
    with (
        gdal(**_GDAL_OPTIONS) as rasterio,
        open_dataset(rasterio, place, name, **options) as dataset,
    ):
        yield Scene(dataset, name, reading, reading.known.get(str(image.path)))
