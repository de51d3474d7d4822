"""Hundreds of damaged images of every format: each is read, or rejected with one line and no other output.

The mutations follow from a seed. ``RECLIP_FUZZ`` multiplies their number, for longer searches.
"""

import io
import logging
import os
import random
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.images import has_alpha, peek_size, read_image
from reclip_d2.errors import ReclipError
from tests.data.tiff_writer import BLACK_IS_ZERO, LAB, MAX_SAMPLE, RGB, WHITE_IS_ZERO, tiff_bytes

MUTATIONS = 24 * int(os.environ.get("RECLIP_FUZZ", "1"))
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
PICTURE[:6] = PICTURE[0, 0]  # both noise and what compresses well


def saved(mode: str, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    image = Image.fromarray(PICTURE)
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    if kind != "BMP":
        options["exif"] = exif
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257).save(stream, "PNG")
    return stream.getvalue()


def heic() -> bytes:
    import pillow_heif

    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(PICTURE)).save(stream, quality=50)
    return stream.getvalue()


GREY_16 = PICTURE[..., 0].astype(np.uint16) * 257
FILES = {
    "jpeg": lambda: saved("RGB", "JPEG"),
    "jpeg-progressive": lambda: saved("RGB", "JPEG", progressive=True, dpi=(72, 72)),
    "jpeg-cmyk": lambda: saved("CMYK", "JPEG"),
    "png": lambda: saved("RGB", "PNG"),
    "png-alpha": lambda: saved("RGBA", "PNG"),
    "png-palette": lambda: saved("P", "PNG", transparency=b"\0\x80\xff"),
    "png-16": deep_png,
    "webp": lambda: saved("RGB", "WEBP"),
    "webp-lossless": lambda: saved("RGBA", "WEBP", lossless=True),
    "bmp": lambda: saved("RGB", "BMP"),
    "bmp-palette": lambda: saved("P", "BMP"),
    "tiff": lambda: saved("RGB", "TIFF"),
    "tiff-lzw": lambda: saved("RGBA", "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda: saved("RGB", "TIFF", compression="jpeg"),
    "tiff-g4": lambda: saved("1", "TIFF", compression="group4"),
    "tiff-inverted": lambda: tiff_bytes(GREY_16, WHITE_IS_ZERO, {MAX_SAMPLE: 4095}),
    "tiff-lab": lambda: tiff_bytes(PICTURE, LAB, compressed=True),
    "tiff-planar": lambda: tiff_bytes(PICTURE, RGB, planar=True, order=">"),
    "tiff-signed": lambda: tiff_bytes(GREY_16.astype(np.int16), BLACK_IS_ZERO),
    "avif": lambda: saved("RGB", "AVIF"),
    "heic": heic,
}


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or lengthen; some bytes of the head, where sizes and offsets are, more often."""
    content = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4))):
        place = generator.randrange(min(len(content), 400) if generator.random() < 0.6 else len(content))
        kind = generator.randrange(6)
        if kind == 0:
            content[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            value = generator.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), generator.getrandbits(32)))
            content[place : place + 4] = struct.pack(generator.choice("<>") + "I", value)
        elif kind == 2:
            del content[max(1, place) :]
        elif kind == 3:
            length = generator.randrange(1, 64)
            content[place:place] = content[place : place + length]
        elif kind == 4:
            del content[place : place + generator.randrange(1, 16)]
        else:
            content[place : place + 8] = bytes([generator.randrange(256)]) * generator.randrange(1, 64)
        content = content or bytearray(b"\0")
    return bytes(content)


@pytest.fixture
def nobody_logs():
    """As in a program without logging: unhandled messages go to the terminal."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    yield
    root.handlers = handlers


@pytest.mark.parametrize("name", FILES)
def test_damaged_images(tmp_path, capfd, recwarn, nobody_logs, name):
    warnings.simplefilter("always")
    logging.getLogger("reclip_d2").setLevel(logging.CRITICAL)
    data, path = FILES[name](), tmp_path / "a.img"
    path.write_bytes(data)
    whole = read_image(path)
    assert whole.shape in ((12, 16, 3), (16, 12, 3))
    generator = random.Random(name)
    read = 0
    for number in range(MUTATIONS):
        path.write_bytes(mutate(data, generator))
        try:
            pixels = read_image(path)
        except ReclipError as error:
            assert str(error).startswith(f"image {path} ") and len(str(error).splitlines()) == 1, number
        else:
            read += 1
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, number
        peek_size(path)
        has_alpha(path)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
