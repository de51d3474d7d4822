"""Opening image files: formats, compression bombs, metadata, and files that are not regular."""

import io
import logging
import os
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from reclip_d2.data import image_file
from reclip_d2.data.image_file import FORMATS, open_image, readable_extensions
from reclip_d2.data.images import peek_size, read_image
from reclip_d2.errors import ReclipError
from tests.data.test_images import corners
from tests.data.tiff_writer import RGB, tiff_bytes

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 scale\nshowpage\n"


def message_of(path, read=read_image) -> str:
    with pytest.raises(ReclipError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def open_label(path) -> None:
    with open_image(path, "label", "get the file again", formats=("PNG",)) as image:
        image.load()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.eps"])
def test_no_other_program_is_started(tmp_path, monkeypatch, name):
    """A PostScript file is a program, and Pillow would have Ghostscript run it: a canary takes Ghostscript's place."""
    canary, path = tmp_path / "canary", tmp_path / name
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path.write_bytes(EPS)
    for read in (read_image, peek_size, open_label):
        try:
            read(path)
        except ReclipError as error:
            assert "cannot be read (it is a PostScript file, not " in str(error)
    assert not canary.exists()
    # The canary works: plain Pillow does start it.
    assert shutil.which("gs") == str(tmp_path / "bin" / "gs")
    with pytest.raises(OSError), Image.open(path) as image:
        image.load()
    assert canary.exists()


OTHERS = {
    "a GIF image": b"GIF89a" + bytes(20),
    "a PDF file": b"%PDF-1.4\n",
    "a Photoshop file": b"8BPS\0\1" + bytes(20),
    "a video": b"\0\0\0\x18ftypmp42" + bytes(20),
    "an HTML page, as left by a failed download": b"\n<!DOCTYPE html><title>404</title>",
    "a Git LFS pointer, run `git lfs pull`": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
    "an empty file": b"",
    "a file of zero bytes, as left by an interrupted copy": bytes(100),
    "a ZIP archive": b"PK\3\4" + bytes(20),
    "an XML or SVG file": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_kinds_are_named(tmp_path, what):
    path = tmp_path / "a.jpg"
    path.write_bytes(OTHERS[what])
    names = "JPEG, PNG, WebP, TIFF, BMP, AVIF or HEIC"
    assert message_of(path) == f"image {path} cannot be read (it is {what}, not {names}): replace or remove the file"
    assert message_of(path, open_label) == f"label {path} cannot be read (it is {what}, not PNG): get the file again"


def test_the_content_counts_and_not_the_extension(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(corners()).save(path, "PNG")
    assert (read_image(path) == corners()).all()
    Image.fromarray(corners()).save(path, "BMP")
    assert "it is a BMP image, not PNG" in message_of(path, open_label)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    assert "is a named pipe, not a regular file" in message_of(tmp_path / "pipe.png")
    assert "is a loop of symbolic links" in message_of(tmp_path / "loop.png")
    assert "is a device, not a regular file" in message_of(tmp_path / "device.png")
    assert peek_size(tmp_path / "pipe.png") == (0, 0)


# ---- metadata -------------------------------------------------------------------------------------------------


def png_with(*chunks: tuple[bytes, bytes], after: tuple[bytes, bytes] | None = None) -> bytes:
    """A PNG of :func:`corners` with further chunks in front of its pixels, or behind."""
    stream = io.BytesIO()
    Image.fromarray(corners()).save(stream, "PNG")
    data = stream.getvalue()
    place = data.index(b"IDAT") - 4

    def pack(chunk: tuple[bytes, bytes]) -> bytes:
        return struct.pack(">I", len(chunk[1])) + b"".join(chunk) + struct.pack(">I", zlib.crc32(b"".join(chunk)))

    end = len(data) - 12
    return data[:place] + b"".join(map(pack, chunks)) + data[place:end] + (pack(after) if after else b"") + data[end:]


def compressed_chunks(size: int) -> dict[str, tuple[bytes, bytes]]:
    """Chunks whose content has ``size`` bytes when it is decompressed."""
    data = zlib.compress(bytes(size))
    return {
        "iTXt": (b"iTXt", b"history\0\1\0\0\0" + data),
        "zTXt": (b"zTXt", b"history\0\0" + data),
        "iCCP": (b"iCCP", b"profile\0\0" + data),
    }


@pytest.mark.parametrize("name", ["iTXt", "zTXt", "iCCP"])
def test_much_metadata(tmp_path, monkeypatch, name):
    path = tmp_path / "a.png"
    path.write_bytes(png_with(compressed_chunks(2 << 20)[name]))
    assert (read_image(path) == corners()).all()
    open_label(path)
    if name != "iCCP":  # which must come first
        path.write_bytes(png_with(after=compressed_chunks(2 << 20)[name]))
        assert (read_image(path) == corners()).all()
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert image_file._MAX_METADATA == 64 << 20
    monkeypatch.setattr(image_file, "_MAX_METADATA", 3 << 20)
    path.write_bytes(png_with(compressed_chunks((3 << 20) + 1)[name]))
    assert "(its metadata has more than 3 MiB)" in message_of(path)
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_much_metadata_in_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(image_file, "_MAX_METADATA", 1 << 20)
    (tmp_path / "a.png").write_bytes(png_with(*[compressed_chunks(300_000)["zTXt"]] * 5))
    assert "(its metadata has more than 1 MiB)" in message_of(tmp_path / "a.png")


# ---- bombs ----------------------------------------------------------------------------------------------------


def png_of(width: int, height: int, bits: int = 8) -> bytes:
    """A black grey PNG, never held uncompressed."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_compression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(20_000, 20_000, bits=1))
    assert path.stat().st_size < 60_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    message = message_of(path)
    assert "has 20000 x 20000 pixels in " in message and "a compression bomb" in message
    assert peek_size(path) == (0, 0)


def test_large_images_that_compress_well_are_no_bombs(tmp_path):
    """A bilevel scan of an empty page, as large as they come, has 300 pixels a byte; small images may have more."""
    path = tmp_path / "a.png"
    path.write_bytes(png_of(7_000, 7_000))
    assert peek_size(path) == (7_000, 7_000)
    path.write_bytes(png_of(9_000, 9_000) + bytes(20_000))
    assert peek_size(path) == (9_000, 9_000)


# ---- HEIC and AVIF --------------------------------------------------------------------------------------------


def save_heic(image: Image.Image, path, **options) -> None:
    import pillow_heif

    pillow_heif.from_pillow(image).save(path, quality=-1, **options)


def test_heic(tmp_path):
    path = tmp_path / "a.heic"
    save_heic(Image.fromarray(corners(32, 48)), path)
    assert {".heic", ".heif", ".hif"} <= set(readable_extensions())
    assert np.abs(read_image(path).astype(int) - corners(32, 48)).mean() < 4
    path.write_bytes(path.read_bytes()[:300])
    message_of(path)


def test_heic_orientation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(corners(32, 48))
    save_heic(image, tmp_path / "a.heic", exif=exif.tobytes())
    expected = corners(32, 48)[::-1].transpose(1, 0, 2)  # a quarter turn clockwise
    pixels = read_image(tmp_path / "a.heic").astype(int)
    assert pixels.shape == expected.shape and np.abs(pixels - expected).mean() < 4


def test_heic_without_the_package(tmp_path, monkeypatch):
    path = tmp_path / "a.heic"
    save_heic(Image.fromarray(corners(32, 48)), path)
    monkeypatch.setattr(image_file, "has_heif", lambda: False)
    monkeypatch.setattr(image_file, "_register_heif", lambda: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert not {".heic", ".heif", ".hif"} & set(readable_extensions())
    assert message_of(path) == f"image {path} is a HEIC image: pip install 'reclip_d2[heif]', or convert it"


def test_avif(tmp_path):
    path, exif = tmp_path / "a.avif", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(corners(32, 48)).save(path, quality=100, exif=exif)
    assert ".avif" in readable_extensions()
    expected = corners(32, 48)[::-1].transpose(1, 0, 2)
    pixels = read_image(path).astype(int)
    assert pixels.shape == expected.shape and np.abs(pixels - expected).mean() < 4


def test_avif_without_support(tmp_path, monkeypatch):
    path = tmp_path / "a.avif"
    Image.fromarray(corners(32, 48)).save(path)
    monkeypatch.setattr(image_file.features, "check", lambda name: False)
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert ".avif" not in readable_extensions()
    assert message_of(path) == f"image {path} is an AVIF image: install a newer Pillow, or convert it"


# ---- Pillow ---------------------------------------------------------------------------------------------------


def test_pillow_says_nothing_itself(tmp_path, capfd, recwarn):
    """A palette with transparency, of which it warns, and more bands than it can decode, which it logs as an error."""
    warnings.simplefilter("always")
    image = Image.fromarray(corners()).quantize(8)
    image.save(tmp_path / "a.png", transparency=bytes(8))
    read_image(tmp_path / "a.png")
    (tmp_path / "a.tif").write_bytes(tiff_bytes(np.zeros((2, 2, 9), np.uint8), RGB))
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # as in a program that has set up no logging
    try:
        message_of(tmp_path / "a.tif")
    finally:
        root.handlers = handlers
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_settings_are_restored(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, list(warnings.filters)
    Image.fromarray(corners()).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png"), open_image(tmp_path / "a.png"):
        assert Image.MAX_IMAGE_PIXELS is None
    (tmp_path / "a.png").write_bytes(b"no image")
    message_of(tmp_path / "a.png")
    assert before == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, list(warnings.filters))


def test_formats_are_pillows_names():
    Image.init()
    assert set(FORMATS) - {"HEIF"} <= set(Image.OPEN)
