"""Opening files that a user names: regular files only, without blocking, and up to a size limit.

A path may point to anything: opening a named pipe waits for a writer, a device never ends, and a text list may turn out
to be a 40 GB video. All user files are opened here; every problem is reported as one line that names the file.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from typing import BinaryIO, TextIO

from reclip_d2.errors import ReclipError

MIB = 1 << 20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# O_NONBLOCK: a path that was a regular file when checked may be a pipe when opened. The others keep a terminal from
# becoming the controlling terminal, and the file from being inherited; Windows has only O_BINARY.
_READ_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _READ_FLAGS |= getattr(os, _name, 0)
# First bytes of files that users give by mistake.
_CONTENTS: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("a Git LFS pointer, run `git lfs pull`", (b"version https://git-lfs",)),
    ("a PNG image", (b"\x89PNG\r\n",)),
    ("a JPEG image", (b"\xff\xd8\xff",)),
    ("a GIF image", (b"GIF87a", b"GIF89a")),
    ("a TIFF image", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("a BMP image", (b"BM",)),
    ("a PostScript file", (b"%!", b"\xc5\xd0\xd3\xc6")),
    ("a PDF file", (b"%PDF",)),
    ("a Photoshop file", (b"8BPS",)),
    ("a JPEG 2000 image", (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    ("a JPEG XL image", (b"\0\0\0\x0cJXL ", b"\xff\x0a")),
    ("an XML or SVG file", (b"<?xml", b"<svg")),
    ("a ZIP archive", (b"PK\x03\x04", b"PK\x05\x06")),
    ("a gzip archive", (b"\x1f\x8b",)),
    ("a NumPy array", (b"\x93NUMPY",)),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

StrPath = str | os.PathLike[str]


class MissingFileError(ReclipError):
    """The file does not exist; for callers that handle this case."""


def display_path(path: StrPath) -> str:
    """A path as one line of text: line ends, control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(path))


def format_bytes(count: int) -> str:
    """``1536`` as ``"1.5 KiB"``."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"


def check_regular(path: StrPath, what: str = "file", remedy: str = "check the path") -> os.stat_result:
    """Status of a regular file, following links; for files that a library opens by path.

    Args:
        what: what errors call the file: ``"image"``, ``"class file"``.
            remedy: the end of the error message.

        Raises:
            MissingFileError: the file does not exist.
        ReclipError: it is a folder, named pipe, socket, device or loop of links, or cannot be reached.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _refusal(path, what, remedy, error) from error
    _check_kind(status, path, what, remedy)
    return status


def open_regular(path: StrPath, what: str = "file", remedy: str = "check the path") -> BinaryIO:
    """Open a regular file for reading in binary mode, without blocking.

    Args:
        what, remedy: see :func:`check_regular`.

    Raises:
        MissingFileError, ReclipError: see :func:`check_regular`; also if it may not be read.
    """
    check_regular(path, what, remedy)  # first, since opening some devices has side effects
    try:
        handle = os.open(path, _READ_FLAGS)
    except OSError as error:
        raise _refusal(path, what, remedy, error) from error
    try:
        _check_kind(os.fstat(handle), path, what, remedy)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: StrPath, what: str = "file", *, limit: int, remedy: str = "check the path") -> bytes:
    """Content of a regular file of at most ``limit`` bytes.

    Args:
        what, remedy: see :func:`check_regular`.

    Raises:
        MissingFileError, ReclipError: see :func:`open_regular`; also if the file is larger.
    """
    with open_regular(path, what, remedy) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            # Not only by the size: files in /proc have none, and another program may be writing.
            data = b"" if size > limit else stream.read(limit + 1)
        except OSError as error:
            raise _refusal(path, what, remedy, error) from error
    if max(size, len(data)) > limit:
        has = f"has {format_bytes(size)}, more" if size > limit else "has more"
        raise ReclipError(f"{what} {display_path(path)} {has} than the {format_bytes(limit)} allowed: {remedy}")
    return data


def read_text(path: StrPath, what: str = "file", *, limit: int, remedy: str = "check the path") -> str:
    """Text of a UTF-8 file of at most ``limit`` bytes, without a byte order mark; line ends are kept.

    Args:
        what, remedy: see :func:`check_regular`.

    Raises:
        MissingFileError, ReclipError: see :func:`read_bytes`; also if it is not UTF-8, with the line.
    """
    return decode_text(read_bytes(path, what, limit=limit, remedy=remedy), path, what)


def decode_text(data: bytes, path: StrPath, what: str = "file") -> str:
    """Decode UTF-8, with or without a byte order mark.

    Args:
        path, what: for the error, see :func:`check_regular`.

    Raises:
        ReclipError: the bytes are not UTF-8 text. The message names the line, from 1.
    """
    where = f"{what} {display_path(path)}"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ReclipError(f"{where} is UTF-16 text: save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ReclipError(f"{where}, line {_line(data[: error.start])}: not UTF-8 text: save it as UTF-8") from error
    if "\0" in text:
        line = _line(data[: data.index(b"\0")])
        raise ReclipError(f"{where}, line {line}: not text, it contains null bytes: save it as UTF-8 text")
    return text


def describe_content(head: bytes) -> str | None:
    """Describe a file by its first bytes (64 or more): ``"an HTML page"``. None if unknown.

    For files that are not what their name says: failed downloads, Git LFS pointers, renamed files.
    """
    if not head:
        return "an empty file"
    if not any(head):
        return "a file of zero bytes, as left by an interrupted copy"
    for name, starts in _CONTENTS:
        if head.startswith(starts):
            return name
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, as left by a failed download"
    if head[:4] == b"RIFF":
        return "a WebP image" if head[8:12] == b"WEBP" else "a sound or video file"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "an AVIF image"
        return "a HEIC image" if brand in _HEIC_BRANDS else "a video"
    return None


def check_output_file(path: StrPath, what: str = "output") -> None:
    """Raise :class:`ReclipError` if an output file exists and is not a regular file.

    Without this check, a rename onto ``/dev/null`` would replace the device for the whole machine.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:  # or a dangling link, which is replaced
        return
    except (OSError, ValueError) as error:
        raise _refusal(path, what, "name another", error) from error
    _check_kind(status, path, what, "name another")


def open_to_append(path: StrPath, what: str = "output") -> TextIO:
    """Open a UTF-8 text file for appending; it is created if it does not exist.

    Raises:
        ReclipError: see :func:`check_output_file`: opening a named pipe would wait for a reader.
    """
    check_output_file(path, what)
    return open(path, "a", encoding="utf-8")


def _line(data: bytes) -> int:
    return len(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))


def _check_kind(status: os.stat_result, path: StrPath, what: str, remedy: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
    raise ReclipError(f"{what} {display_path(path)} is {kind}, not a regular file: {remedy}")


def _refusal(path: StrPath, what: str, remedy: str, error: OSError | ValueError) -> ReclipError:
    where = f"{what} {display_path(path)}"
    if not isinstance(error, OSError):  # "embedded null byte", or a name that the file system cannot encode
        return ReclipError(f"{where} is not a valid path: {remedy}")
    if error.errno == errno.ENOENT:
        return MissingFileError(f"{where} does not exist: {remedy}")
    if error.errno == errno.ELOOP:
        return ReclipError(f"{where} is a loop of symbolic links: {remedy}")
    return ReclipError(f"{where} cannot be read ({error.strerror or type(error).__name__}): {remedy}")
