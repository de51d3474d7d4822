"""Images at URLs that fsspec can open: S3, GCS, Azure, HTTP, and others.

Images are listed once, and each is copied next to the run before it is read. fsspec is an extra; its file systems have
packages of their own, such as s3fs.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, display_path
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.progress import count_steps

if TYPE_CHECKING:
    from reclip_d2.data.image_folder import ImageFile

REMEDY = "pip install 'reclip_d2[remote]'"
# Packages of fsspec's file systems; others are named by fsspec's own message.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
HTTP = ("http", "https")
MOST_BYTES = 4096 * MIB
"""Larger files are not copied."""
_CHUNK = 4 * MIB
_TRIES, _WAIT = 3, 1.0
_THREADS = 8


def is_url(source: str) -> bool:
    """Whether a source is a URL, and not a path."""
    return _URL.match(source) is not None


def load_fsspec() -> ModuleType:
    """The package fsspec.

    Raises:
        ReclipError: it is not installed.
    """
    try:
        import fsspec  # optional
        import fsspec.core
    except ModuleNotFoundError as error:
        raise ReclipError(f"URLs need the package fsspec: {REMEDY}") from error
    return fsspec


@contextlib.contextmanager
def naming_url(url: str, what: str = "") -> Iterator[None]:
    """Report any error of a file system as one about ``url``."""
    where = what or display_path(url)
    try:
        yield
    except (ReclipError, MemoryError):
        raise
    except ImportError as error:
        protocol = url.partition("://")[0].lower()
        package = _PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else REMEDY
        raise ReclipError(f"{where}: {_cause(error)}: {remedy}") from error
    except Exception as error:  # every file system has errors of its own
        if isinstance(error, FileNotFoundError):
            if not _is_of_the_server(error.__cause__):
                raise ReclipError(f"{where} does not exist: check the URL") from error
            error = error.__cause__
        raise ReclipError(f"{where} cannot be read ({_cause(error)}): check the URL and your access") from error


def _is_of_the_server(cause: BaseException | None) -> bool:
    """Whether fsspec calls a file missing because its server cannot be reached or refuses to answer."""
    unreachable = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return unreachable or getattr(cause, "status", 404) != 404


def stream_options(url: str) -> dict[str, int]:
    """Options of fsspec's ``open`` that read a file from beginning to end in one request, also from servers that do not
    send parts of files."""
    return {"block_size": 0} if _is_http(url) else {}


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_remote(url: str, limit: int) -> bytes:
    """The content of a small file, such as a list.

    Raises:
        ReclipError: it cannot be read, or has more than ``limit`` bytes.
    """
    with naming_url(url):
        system, path = load_fsspec().core.url_to_fs(url)
        with system.open(path, "rb") as stream:
            data = stream.read(limit + 1)
    if len(data) > limit:
        raise ReclipError(f"{display_path(url)} has more than {limit // MIB:,} MiB: split it")
    return data


def find_remote(url: str, is_image: Callable[[PurePosixPath], bool]) -> tuple[list[str], set[PurePosixPath]]:
    """URLs of the images that a URL names, sorted: an image, a folder (searched recursively; names that begin with a
    dot are skipped) or a glob; and other files that were found.

    Args:
        is_image: whether a path has the extension of an image.

    Raises:
        ReclipError: there are none, or the URL cannot be listed.
    """
    if "::" in url:
        raise ReclipError(f"IMAGES {display_path(url)} is a chain of URLs: name the last one alone")
    if is_image(url_path(url)) and not glob.has_magic(_split(url)[1]):
        return [url], set()
    with naming_url(url, f"IMAGES {display_path(url)}"):
        system, path = load_fsspec().core.url_to_fs(url)
        found = system.glob(path) if glob.has_magic(path) else system.find(path)
        urls = sorted(system.unstrip_protocol(name) for name in found)
    visible = [u for u in urls if not any(part.startswith(".") for part in _relative(u, url))]
    images = [u for u in visible if is_image(url_path(u))]
    if not images:
        raise ReclipError(f"IMAGES {display_path(url)} has no images: check the URL")
    return images, {url_path(u) for u in visible if not is_image(url_path(u))}


def _relative(url: str, base: str) -> tuple[str, ...]:
    """The last parts of a URL, as many as ``base`` does not have before its first wildcard."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), url_path(base).parts)
    return url_path(url).parts[len(list(fixed)) :]


def url_path(url: str) -> PurePosixPath:
    """``HOST/FOLDERS/NAME`` of a URL, without its query.

    Raises:
        ReclipError: it has a part ``..``, which could name a file elsewhere.
    """
    host, name = _split(url)
    name = unquote(name) if _is_http(url) else name
    path = PurePosixPath(host.rpartition("@")[2].replace(":", "_"), name.lstrip("/"))
    if ".." in path.parts or "\0" in str(path):
        raise ReclipError(f"{display_path(url)} has .. in its path: name the file itself")
    return path


def _split(url: str) -> tuple[str, str]:
    """Host and path of a URL. Names of other stores than HTTP are not quoted, and may have ``?`` and ``#``."""
    if _is_http(url):
        parts = urlsplit(url)
        return parts.netloc, parts.path
    host, _, path = url.partition("://")[2].partition("/")
    return host, path


def _is_http(url: str) -> bool:
    return url.partition("://")[0].lower() in HTTP


def fetch(url: str, target: Path) -> None:
    """Copy a file atomically; errors of the network are retried.

    Raises:
        ReclipError: it does not exist, cannot be read, or has more than :data:`MOST_BYTES`.
    """
    for attempt in range(_TRIES):
        try:
            _copy(url, target)
            return
        except ReclipError as error:
            lasting = not isinstance(error.__cause__, OSError) or isinstance(
                error.__cause__, FileNotFoundError | PermissionError
            )
            if lasting or attempt == _TRIES - 1:
                raise
            time.sleep(_WAIT * 2**attempt)


def _copy(url: str, target: Path) -> None:
    where = f"image {display_path(url)}"
    with naming_url(url, where):
        system, path = load_fsspec().core.url_to_fs(url)
        source = system.open(path, "rb", **stream_options(url))
    size = 0
    with source, atomic_write(target) as temporary, open(temporary, "wb") as stream:
        while chunk := _read(source, url, where):
            size += len(chunk)
            if size > MOST_BYTES:
                raise ReclipError(f"{where} has more than {MOST_BYTES // MIB:,} MiB: cut it")
            stream.write(chunk)


def _read(source: BinaryIO, url: str, where: str) -> bytes:
    with naming_url(url, where):  # errors of the network, not of the disk
        return source.read(_CHUNK)


def fetch_images(images: Sequence[ImageFile]) -> dict[str, str]:
    """Copy the images at URLs that are not there yet; returns the reason for each that cannot be, by image id."""
    todo = [image for image in images if image.url and not image.path.exists()]
    problems: dict[str, str] = {}

    def get(image: ImageFile) -> str:
        try:
            fetch(image.url, image.path)
        except ReclipError as error:
            return str(error)
        return ""

    with count_steps("fetch", len(todo)) as steps, ThreadPoolExecutor(_THREADS) as pool:
        try:
            for image, problem in zip(todo, pool.map(get, todo), strict=True):
                if problem:
                    problems[image.image_id] = problem
                steps.advance()
        finally:
            pool.shutdown(cancel_futures=True)
    return problems


def table_paths(data: Any, name: str, extension: str) -> list[str]:
    """Paths or URLs in a list of images, a CSV or Parquet file: the column ``image``, ``path``, ``url``, ``file_name``
    or ``filename``, or the only one.

    Args:
        data: its bytes.
        name: what errors call it.
        extension: ``.csv`` or ``.parquet``.

    Raises:
        ReclipError: it is damaged, has no such column, or no package can read it.
    """
    columns, read = _read_csv(data, name) if extension == ".csv" else _read_parquet(data, name)
    known = {column.strip().lower(): column for column in reversed(columns)}
    column = next((known[n] for n in ("image", "path", "url", "file_name", "filename") if n in known), None)
    if column is None and len(columns) == 1:
        column = columns[0]
    if column is None:
        raise ReclipError(f"{name} has no column image, path, url, file_name or filename: rename one")
    return [text for value in read(column) if isinstance(value, str) and (text := value.strip())]


def _read_csv(data: bytes, name: str) -> tuple[list[str], Callable[[str], list[Any]]]:
    import csv
    import io

    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReclipError(f"{name} is not a CSV file in UTF-8 ({_cause(error)}): save it again") from error
    return columns, lambda column: [row[column] for row in rows]


def _read_parquet(data: bytes, name: str) -> tuple[list[str], Callable[[str], list[Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet  # optional
    except ModuleNotFoundError as error:
        raise ReclipError(f"{name} needs the package pyarrow: {REMEDY}") from error
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise ReclipError(f"{name} is not a Parquet file ({_cause(error)}): write it again") from error

    def read(column: str) -> list[Any]:
        try:
            return file.read(columns=[column]).column(0).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ReclipError(f"{name} is damaged ({_cause(error)}): write it again") from error

    return columns, read
