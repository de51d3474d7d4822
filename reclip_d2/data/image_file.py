"""Opening image files: allowed formats, and checks before any pixel is decoded."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from reclip_d2.data.tiff import describe_tiff, silence_libtiff
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, describe_content, display_path, format_bytes, open_regular
from reclip_d2.utils.pages import split_page

# Pillow's names of the allowed formats. No other is opened, whatever the file's extension: for some, such as EPS,
# Pillow starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "HEIF")
# Article and name of each in messages.
_NAMES = {
    "JPEG": ("a", "JPEG"),
    "PNG": ("a", "PNG"),
    "WEBP": ("a", "WebP"),
    "TIFF": ("a", "TIFF"),
    "BMP": ("a", "BMP"),
    "AVIF": ("an", "AVIF"),
    "HEIF": ("a", "HEIC"),
}
_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")
_HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
HEIF_REMEDY = "pip install 'reclip_d2[heif]'"

# Pillow rejects images of 179 million pixels or more, but scans and aerial images can have 20,000 x 20,000 = 400
# million. Decoding an image at our limit takes 7 GB.
MAX_PIXELS = 1_000_000_000
# A file of few bytes and very many pixels is a compression bomb, or blank. Bilevel scans, the densest real images, have
# a few hundred pixels per byte, photographs 1 to 20.
_MAX_PIXELS_PER_BYTE = 4_000
_MANY_PIXELS = 50_000_000
# Of a PNG's compressed metadata. Editing programs write several MiB of history or colour profile; Pillow allows one
# MiB.
_MAX_METADATA = 64 * MIB

# Without a handler, Pillow's log of damaged files would reach the terminal; our errors name the file.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class _PillowSettings:
    """Changes Pillow's global settings while any thread reads an image."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0
        self.stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        with self.lock:
            if self.readers == 0:
                self._change()
            self.readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.readers -= 1
                if self.readers == 0:
                    self.stack.close()

    def _change(self) -> None:
        for module, name, value in (
            (Image, "MAX_IMAGE_PIXELS", None),
            (PngImagePlugin, "MAX_TEXT_CHUNK", _MAX_METADATA),
            (PngImagePlugin, "MAX_TEXT_MEMORY", _MAX_METADATA),
        ):
            self.stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        self.stack.enter_context(warnings.catch_warnings())
        # About damaged metadata, or transparency, which is handled here.
        warnings.filterwarnings("ignore", module=r"PIL\.")


_pillow_settings = _PillowSettings()


def readable_extensions() -> tuple[str, ...]:
    """Extensions, in lower case, of the images that can be read. AVIF depends on Pillow, HEIC on pillow-heif."""
    avif = (".avif",) if "avif" in features.modules and features.check("avif") else ()
    return (*_EXTENSIONS, *avif, *(_HEIF_EXTENSIONS if has_heif() else ()))


def has_heif() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def extension_remedy(extension: str) -> str:
    """How to enable reading an extension (in lower case); "" if it cannot be."""
    if extension in _HEIF_EXTENSIONS:
        return HEIF_REMEDY
    return "install a newer Pillow" if extension == ".avif" else ""


@functools.cache
def _register_heif() -> None:
    """Enable HEIC in Pillow."""
    if has_heif():
        import pillow_heif  # optional

        pillow_heif.register_heif_opener()


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike[str],
    what: str = "image",
    remedy: str = "replace or remove the file",
    *,
    formats: Sequence[str] = FORMATS,
) -> Iterator[Image.Image]:
    """Open an image file with Pillow; its pixels are decoded inside the ``with`` block.

    A path may name a page of a TIFF (:mod:`reclip_d2.utils.pages`).

    Any ``Exception`` in the block is reported as a damaged file: do nothing else there.

    Args:
        what: what errors call the file.
        remedy: the end of the error message.
        formats: Pillow's names of the accepted formats, a subset of :data:`FORMATS`.

    Raises:
        MissingFileError: the file does not exist.
        ReclipError: it is not a regular file, has another format, is damaged, has more than :data:`MAX_PIXELS`, or so
            many pixels per byte that it can only be a compression bomb.
    """
    file, page = split_page(path)
    with open_regular(file, what, remedy) as stream, _pillow_settings.changed():
        where = f"{what} {display_path(path)}"
        try:
            with _open(stream, where, remedy, formats) as image:
                if page > 1:
                    image.seek(page - 1)
                _check_size(image, os.fstat(stream.fileno()).st_size, where)
                yield image
        except (ReclipError, MemoryError):
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise ReclipError(f"{where} cannot be read ({_cause(error)}): {remedy}") from error


def _open(stream: BinaryIO, where: str, remedy: str, formats: Sequence[str]) -> Image.Image:
    head = stream.read(64)
    stream.seek(0)
    if head[4:8] == b"ftyp":
        _register_heif()
    if head[:2] in (b"II", b"MM"):
        silence_libtiff()
    Image.init()  # a format unknown to Pillow, such as HEIF without pillow-heif, would raise KeyError
    usable = [name for name in formats if name in Image.OPEN]
    try:
        return Image.open(stream, formats=usable)
    except UnidentifiedImageError as error:
        content = describe_content(head)
        wanted = next((name for name in formats if content == f"{_NAMES[name][0]} {_NAMES[name][1]} image"), None)
        if wanted is not None and wanted not in usable:
            needs = HEIF_REMEDY if wanted == "HEIF" else "install a newer Pillow"
            raise ReclipError(f"{where} is {content}: {needs}, or convert it") from error
        stream.seek(0)
        if wanted == "TIFF" and (kind := describe_tiff(stream)):
            raise ReclipError(f"{where} is a TIFF with {kind}: convert it to 8-bit RGB") from error
        if content is not None and wanted is None:
            *names, last = [_NAMES[name][1] for name in formats]
            names = f"{', '.join(names)} or {last}" if names else last
            raise ReclipError(f"{where} cannot be read (it is {content}, not {names}): {remedy}") from error
        raise ReclipError(f"{where} cannot be read (not an image, or damaged): {remedy}") from error


def _check_size(image: Image.Image, size: int, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ReclipError(f"{where} has {width} x {height} pixels, more than {MAX_PIXELS:,}: cut it into pieces")
    if width * height > max(_MANY_PIXELS, size * _MAX_PIXELS_PER_BYTE):
        raise ReclipError(
            f"{where} has {width} x {height} pixels in {format_bytes(size)}, more than any photograph or scan: it is"
            " blank or a compression bomb, remove it"
        )


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "MAX_TEXT" in text or "text chunks" in text:
        text = f"its metadata has more than {format_bytes(_MAX_METADATA)}"
    return text[:200] or type(error).__name__
