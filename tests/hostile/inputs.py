"""Hostile and odd files: each function writes one at a path."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.cli.conftest import picture
from tests.hostile.driver import CANARY

Writer = Callable[[Path], object]


def content(data: bytes | str) -> Writer:
    """A file of this content; ``{case}`` in a text is the folder of the case."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))

    return write


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(height: int = 96, width: int = 96) -> Image.Image:
    """Blocks of colour."""
    return Image.fromarray(picture(7, height, width))


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    """A PNG up to its header."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))


class Payload:
    """Pickled, it writes the canary when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {CANARY}",)


PICKLE = pickle.dumps(Payload())
EPS = (
    f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({CANARY}) (w) file dup (x) writestring closefile\n"
    "0 0 64 64 rectfill showpage\n%%EOF\n"
)
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345678\n"
HTML = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not Found</body></html>\n"


def fifo(path: Path) -> None:
    """A named pipe without a writer."""
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """A socket."""
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link(target: str) -> Writer:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def folder(path: Path) -> None:
    """A folder with a file."""
    path.mkdir()
    (path / "x").write_text("x")


def bomb(path: Path) -> None:
    """20,000 x 20,000 pixels in 48 KB."""
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


def float_tiff(path: Path) -> None:
    """Floating-point pixels."""
    Image.fromarray(np.random.default_rng(0).random((64, 64), np.float32)).save(path, "TIFF")


_JPEG, _PNG = encoded(rgb(), "JPEG"), encoded(rgb(), "PNG")
_TEXT = PngImagePlugin.PngInfo()
_TEXT.add_itxt("comment", "a" * 2_000_000, zip=True)
_EXIF = Image.Exif()
_EXIF[0x0112] = 3

BAD_IMAGES: dict[str, Writer] = {
    "empty": content(b""),
    "zeros": content(b"\0" * 4096),
    "text": content("no image"),
    "html": content(HTML),
    "lfs": content(LFS),
    "pickle": content(PICKLE),
    "eps": content(EPS),
    "eps-dos": content(b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 30, len(EPS), 0, 0, 0, 0) + b"\0\0" + EPS.encode()),
    "pdf": content("%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\n%%EOF"),
    "svg": content('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "psd": content(b"8BPS\0\1" + b"\0" * 6 + b"\0\3" + struct.pack(">II", 64, 64) + b"\0\x08\0\3" + b"\0" * 64),
    "cut-jpeg": content(_JPEG[: len(_JPEG) // 2]),
    "cut-jpeg-header": content(_JPEG[:20]),
    "cut-png": content(_PNG[: len(_PNG) // 2]),
    "png-crc": content(_PNG[:40] + bytes([_PNG[40] ^ 0xFF]) + _PNG[41:]),
    "png-no-data": content(png_header(64, 64) + chunk(b"IEND", b"")),
    "png-no-size": content(png_header(0, 64) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")),
    "png-huge": content(png_header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")),
    "png-wide": content(png_header(2**31 - 1, 1) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")),
    "bomb": bomb,
    "thin": content(encoded(Image.new("RGB", (3000, 2)), "PNG")),
    "fifo": fifo,
    "socket": unix_socket,
    "device": link("/dev/zero"),
    "terminal": link("/dev/tty"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": link("nothing"),
    "process": link("/proc/self/mem"),
}
"""Files under an image's name that no program may take for one, by what they are."""

GOOD_IMAGES: dict[str, Writer] = {
    "grey.png": content(encoded(rgb().convert("L"), "PNG")),
    "palette.png": content(encoded(rgb().convert("P"), "PNG")),
    "bits.png": content(encoded(rgb().convert("1"), "PNG")),
    "alpha.png": content(encoded(rgb().convert("RGBA"), "PNG")),
    "grey-alpha.png": content(encoded(rgb().convert("LA"), "PNG")),
    "deep.png": content(encoded(Image.fromarray(np.full((64, 64), 40_000, np.uint16)), "PNG")),
    "itxt.png": content(encoded(rgb(), "PNG", pnginfo=_TEXT)),
    "cmyk.jpg": content(encoded(rgb().convert("CMYK"), "JPEG")),
    "progressive.jpg": content(encoded(rgb(), "JPEG", progressive=True)),
    "turned.jpg": content(encoded(rgb(64, 96), "JPEG", exif=_EXIF)),
    "bad-exif.jpg": content(encoded(rgb(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)),
    "x.bmp": content(encoded(rgb(), "BMP")),
    "float.tif": float_tiff,
    "x.webp": content(encoded(rgb(), "WEBP")),
    "x.tiff": content(encoded(rgb(), "TIFF")),
    "a b'c\"d;$(touch CANARY)`touch CANARY`.png": content(_PNG),
    "-rf.png": content(_PNG),
    "b\udcff.png": content(_PNG),
    "é日本.png": content(_PNG),
    "%s%n{0}.png": content(_PNG),
    ".hidden/x.png": content(_PNG),
}
"""Sound images."""

BAD_CLASSES: dict[str, tuple[Writer, str]] = {
    "empty": (content(""), "no class"),
    "comments": (content("# a\n# b\n"), "no class"),
    "one": (content("sky\n"), "only one class"),
    "twice": (content("sky\nwood\nsky\n"), "line 3"),
    "twice-cased": (content("Sky\nwood\nsKY\n"), "line 3"),
    "twice-nfd": (content("caf\u00e9\ncafe\u0301\n"), "line 2"),
    "twice-wide": (content("sky\n\uff53\uff4b\uff59\n"), "line 2"),
    "twice-quotes": (content("cat's eye\ncat\u2019s eye\n"), "line 2"),
    "twice-entity": (content("black & white\nblack &amp; white\n"), "line 2"),
    "comma": (content("sky,\nwood\n"), "line 1"),
    "commas": (content("sky\n,,,\n"), "line 2"),
    "utf-16": (content("sky\nwood\n".encode("utf-16")), "UTF"),
    "latin-1": (content(b"sky\nf\xe4n\n"), "line 2"),
    "zeros": (content(b"sky\0\nwood\n"), "line 1"),
    "bell": (content("sky\nwood\x07\n"), "line 2"),
    "escape": (content("sky\n\x1b[31mwood\n"), "line 2"),
    "direction": (content("sky\nwo\u202eod\n"), "line 2"),
    "long": (content("sky\n" + "very " * 200 + "\n"), "line 2"),
    "longest": (content("sky\n" + "a" * 1_000_000 + "\n"), "line 2|MiB|KiB"),
    "many": (content("".join(f"class {i}\n" for i in range(300))), "255"),
    "many-background": (content("sky\nbackground: " + ", ".join(f"b{i}" for i in range(300))), "255"),
    "many-synonyms": (content("sky\nwood, " + ", ".join(f"b{i}" for i in range(5000))), "4,096"),
    "background-twice": (content("sky\nbackground: a\nbackground: b\n"), "line 3"),
    "background-class": (content("sky\nbackground\nbackground: a\n"), "background"),
    "key": (content("sky\nmodel: wood\n"), "line 2"),
    "pickle": (content(PICKLE), "classes.txt"),
    "image": (content(_PNG), "classes.txt"),
    "fifo": (fifo, "named pipe"),
    "device": (link("/dev/zero"), "device"),
    "folder": (folder, "folder"),
    "missing": (link("nothing"), "classes.txt"),
    "loop": (link("classes.txt"), "classes.txt"),
}
"""Class files that are wrong, and what the error must say."""

GOOD_CLASSES: dict[str, Writer] = {
    "bom": content(b"\xef\xbb\xbfsky\r\nwood\r\n"),
    "mac": content("sky\rwood\r"),
    "no-end": content("sky\nwood"),
    "comments": content("# c\n\nsky # blue\n  wood  \n"),
    "unicode": content("himmel\nträ, 木\n"),
    "shell": content("$(touch CANARY)\n`touch CANARY` wood\n"),
}


def replace(name: str, writer: Writer) -> Callable[[Path], None]:
    """A file of the case's folder is replaced."""

    def prepare(case: Path) -> None:
        path = case / name
        if path.is_file() or path.is_symlink():
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(path)

    return prepare
