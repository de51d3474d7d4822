"""Geometry from headers against the decoded image, for every format and place of the EXIF data."""

import zlib

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.images import read_geometry, read_image
from reclip_d2.data.orientation import turn_upright
from reclip_d2.errors import ReclipError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_geometry(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(PIXELS).save(path, exif=exif, **options)
    geometry = read_geometry(path)
    assert geometry == ((5, 9), orientation)
    upright = read_image(path)
    assert geometry.upright == upright.shape[:2]
    if suffix != "jpg":
        np.testing.assert_array_equal(turn_upright(PIXELS, orientation), upright)


def move_after_pixels(data: bytes, kind: bytes) -> bytes:
    """A PNG with its first chunk of a kind moved behind the pixels."""
    start = data.index(kind) - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    chunk, rest = data[start:end], data[:start] + data[end:]
    place = rest.index(b"IEND") - 4
    return rest[:place] + chunk + rest[place:]


def test_exif_data_after_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path, exif=exif)
    path.write_bytes(move_after_pixels(path.read_bytes(), b"eXIf"))
    assert read_geometry(path) == ((5, 9), 6)
    assert read_image(path).shape == (9, 5, 3)


def test_orientation_in_xmp(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    text = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'
    chunk = len(text).to_bytes(4) + b"iTXt" + text + zlib.crc32(b"iTXt" + text).to_bytes(4)
    data = path.read_bytes()
    for place in (33, data.index(b"IEND") - 4):  # before and after the pixels
        path.write_bytes(data[:place] + chunk + data[place:])
        assert read_geometry(path).upright == read_image(path).shape[:2] == (9, 5)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientations_are_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(PIXELS).save(tmp_path / "image.png", exif=exif)
    assert read_geometry(tmp_path / "image.png") == ((5, 9), 1)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), PIXELS)


def test_damaged_exif_data(tmp_path, caplog):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_geometry(path).upright == read_image(path).shape[:2] == (5, 9)


def test_no_image(tmp_path):
    with pytest.raises(ReclipError, match=r"image .*none.png does not exist"):
        read_geometry(tmp_path / "none.png")
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ReclipError, match=r"image .*x.png cannot be read"):
        read_geometry(tmp_path / "x.png")
