"""Index PNGs: palettes in every order, depths, sizes, damage, and files that are not index images."""

import os
import zlib

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.index_images import PLAIN, Palette, index_size, pascal_color, read_index_image
from reclip_d2.errors import ReclipError

A, B, GREY = (200, 0, 0), (0, 0, 200), (90, 90, 90)
OWN = Palette({0: A, 1: B}, own=True)
LOOSE = Palette({0: A, 1: B})


def write(path, indices, table=None) -> str:
    image = Image.fromarray(np.array(indices, np.uint8))
    if table is not None:
        image.putpalette([value for color in table for value in color])
    image.save(path)
    return str(path)


def write_raw(path, bits: int, row: bytes, width: int, table=None) -> str:
    """A PNG of one row, grey or with a palette, as Pillow cannot write it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + (1).to_bytes(4) + bytes([bits, 0 if table is None else 3, 0, 0, 0])
    colors = b"" if table is None else chunk(b"PLTE", bytes(value for color in table for value in color))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colors + pixels + chunk(b"IEND", b""))
    return str(path)


def read(path, palette: Palette = PLAIN, size=(1, 2), **options) -> list:
    return read_index_image(path, size, "its image", palette=palette, **options).tolist()


def refusal(path, palette: Palette = PLAIN, size=(1, 2), **options) -> str:
    with pytest.raises(ReclipError) as caught:
        read(path, palette, size, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_pascal_colours():
    """Of VOC's development kit: background, aeroplane, bicycle, bus, tv monitor, seam."""
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (0, 128, 128), (0, 64, 128), (224, 224, 192)]
    assert [pascal_color(k) for k in (0, 1, 2, 6, 20, 255)] == expected


@pytest.mark.parametrize("palette", [OWN, LOOSE, Palette()])
def test_palettes_in_the_order_of_the_ids(tmp_path, palette):
    grey = [(k, k, k) for k in range(256)]
    assert read(write(tmp_path / "grey.png", [[1, 255]], grey), palette) == [[1, 255]]
    assert read(write(tmp_path / "l.png", [[1, 255]]), palette) == [[1, 255]]
    if palette.colors:
        ours = write(tmp_path / "ours.png", [[0, 1, 255]], [A, B, *[(0, 0, 0)] * 254])
        assert read(ours, palette, (1, 3)) == [[0, 1, 255]]
        short = write_raw(tmp_path / "short.png", 8, b"\x00\xff", 2, [A, B])  # the ignored id is beyond the palette
        assert read(short, palette) == [[0, 255]]
    voc = write(tmp_path / "voc.png", [[0, 1]], [pascal_color(k) for k in range(256)])
    if not palette.own:
        assert read(voc, palette) == [[0, 1]]
    else:  # the data set has other colours: (128, 0, 0) is not one of them
        assert "colour (128, 0, 0) is not one of the data set's" in refusal(voc, palette)


def test_colours_that_name_ids(tmp_path):
    path = write(tmp_path / "p.png", [[0, 1, 2, 3]], [B, (224, 224, 192), A, (0, 0, 0)])
    assert read(path, OWN, (1, 4)) == [[1, 255, 0, 255]]
    assert "palette is not in the order of the ids (its entry 0 is (0, 0, 200))" in refusal(path, LOOSE, (1, 4))


def test_only_used_entries_count(tmp_path):
    assert read(write(tmp_path / "p.png", [[1, 2]], [GREY, A, B, GREY]), OWN) == [[0, 1]]
    assert "colour (90, 90, 90)" in refusal(write(tmp_path / "p.png", [[1, 3]], [GREY, A, B, GREY]), OWN)


def test_a_colour_of_two_ids(tmp_path):
    twins = Palette({0: A, 1: B, 2: B}, own=True)
    assert read(write(tmp_path / "p.png", [[1, 2]], [A, B, B]), twins) == [[1, 2]]  # in order: nothing is left open
    assert "colour (0, 0, 200) is shared by several ids (1, 2)" in refusal(
        write(tmp_path / "p.png", [[0, 1]], [B, A]), twins
    )


def test_an_index_beyond_the_palette(tmp_path):
    path = write_raw(tmp_path / "p.png", 8, b"\x00\x07", 2, [A, B])
    assert "index 7 without a colour" in refusal(path, OWN)
    assert "its entry 7 is missing" in refusal(path, LOOSE)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_palettes(tmp_path, bits):
    """Programs store few indices in few bits; that changes no index."""
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([*A, *B])
    image.save(tmp_path / "p.png", bits=bits)
    assert read(tmp_path / "p.png", OWN) == [[0, 1]]


@pytest.mark.parametrize(("bits", "row"), [(2, b"\x60"), (4, b"\x12")])
def test_grey_levels_that_a_decoder_would_scale(tmp_path, bits, row):
    """Ids 1 and 2 in two or four bits: decoders give 85 and 170, or 17 and 34."""
    path = write_raw(tmp_path / "grey.png", bits, row, 2)
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == [[85, 170]] if bits == 2 else [[17, 34]]
    assert f"is a grey PNG of {bits} bits per pixel" in refusal(path)


def test_depths(tmp_path):
    Image.fromarray(np.array([[300, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read(tmp_path / "deep.png") == [[300, 65535]]
    assert "is a I;16 image: write 8 bits" in refusal(
        tmp_path / "deep.png", modes=("L", "P"), wrong_mode="write 8 bits"
    )
    Image.fromarray(np.zeros((1, 2, 3), np.uint8)).save(tmp_path / "rgb.png")
    assert "is a RGB image" in refusal(tmp_path / "rgb.png")


@pytest.mark.parametrize("suffix", ["jpg", "gif", "tif", "bmp"])
def test_other_formats(tmp_path, suffix):
    """A JPEG's values are near its ids, and no more; named .png or not."""
    Image.fromarray(np.zeros((1, 2), np.uint8)).save(tmp_path / f"x.{suffix}")
    (tmp_path / f"x.{suffix}").rename(tmp_path / "x.png")
    assert "not PNG)" in refusal(tmp_path / "x.png")


def test_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a named pipe" in refusal(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.png")
    assert "does not exist: get the file again" in refusal(tmp_path / "none.png")


def test_size(tmp_path):
    path = write(tmp_path / "l.png", [[0, 0], [0, 0], [0, 0]])
    assert index_size(path) == (3, 2)
    assert "has size 2x3, its image 3x2: they must be the same" in refusal(path, size=(2, 3))


@pytest.mark.parametrize("keep", [0, 7, 20, 50, 120])
def test_cut_files(tmp_path, keep):
    path = write(tmp_path / "l.png", np.random.default_rng(0).integers(0, 9, (40, 40)))
    (tmp_path / "l.png").write_bytes((tmp_path / "l.png").read_bytes()[:keep])
    assert "cannot be read" in refusal(path, size=(40, 40))
