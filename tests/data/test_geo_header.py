"""Which files are GeoTIFFs, and their size, by the tags alone."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.geo_header import geotiff_size, read_geo_header
from tests.geotiffs import write_geotiff


class Stream(io.BytesIO):
    """A file that is sent from beginning to end."""

    def seek(self, *_: object) -> int:
        raise ValueError("Cannot seek streaming HTTP file")


def header(order: str, *, big: bool = False, place: int = 0, georeferenced: bool = True) -> bytes:
    """The first directory of a TIFF of 300 x 70,000 (H, W) pixels, by the specification, at ``place`` or at once."""
    start = 16 if big else 8
    place = place or start
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, place) if big else struct.pack(order + "HI", 42, place)
    entry = order + ("HHQ" if big else "HHI")

    def tag(number: int, kind: int, value: bytes) -> bytes:
        return struct.pack(entry, number, kind, 1) + value.ljust(8 if big else 4, b"\0")

    tags = [tag(256, 4, struct.pack(order + "I", 70_000)), tag(257, 3, struct.pack(order + "H", 300))]
    tags += [tag(34735, 3, struct.pack(order + "H", 1))] if georeferenced else []
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return (mark + head).ljust(place, b"\0") + count + b"".join(tags)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("place", [0, 5_000_000])
def test_both_orders_of_tiff_and_bigtiff(order, big, place):
    data = header(order, big=big, place=place)
    assert read_geo_header(io.BytesIO(data)) == (300, 70_000)
    assert read_geo_header(Stream(data)) == (300, 70_000)
    assert read_geo_header(io.BytesIO(header(order, big=big, georeferenced=False))) is None
    with pytest.raises(struct.error):
        read_geo_header(Stream(data[:-5]))


def test_other_files_are_none(tmp_path):
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.tif")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    (tmp_path / "c.tif").write_bytes(b"")
    names = ("a.tif", "a.png", "b.tif", "c.tif", "none.tif")
    assert [geotiff_size(tmp_path / name) for name in names] == [None] * 5
    # The tag alone makes one.
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "d.TIF", "TIFF", tiffinfo={33550: (1.0, 1.0, 0.0)})
    assert geotiff_size(tmp_path / "d.TIF") == (4, 5)


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"driver": "COG"}, {"ENDIANNESS": "BIG"}, {"crs": None}])
def test_files_of_gdal(tmp_path, options):
    pytest.importorskip("rasterio")
    assert geotiff_size(write_geotiff(tmp_path / "a.tif", np.zeros((3, 20, 31), np.uint16), **options)) == (20, 31)
