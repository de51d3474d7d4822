"""Images of unusual depth and colours: correct values, by hand, or an error that describes the file."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.images import describe_alpha, has_alpha, read_image
from reclip_d2.errors import ReclipError
from tests.data.tiff_writer import (
    BLACK_IS_ZERO,
    CMYK,
    COLOR_MAP,
    EXTRA_SAMPLES,
    LAB,
    MAX_SAMPLE,
    PALETTE,
    PHOTOMETRIC,
    RGB,
    SMAX_SAMPLE,
    WHITE_IS_ZERO,
    YCBCR,
    tiff_bytes,
)

GREY = np.array([[0, 257, 25700], [32896, 65278, 65535]], np.uint16)
GREY_8 = [[0, 1, 100], [128, 254, 255]]
COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]], np.uint8)
LAYOUTS = [(order, compressed) for order in "<>" for compressed in (False, True)]


def read(tmp_path, *arguments, **options) -> np.ndarray:
    """What is read of a TIFF, ``(H, W, 3)``."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_bytes(*arguments, **options))
    return read_image(path)


def grey(tmp_path, *arguments, **options) -> list:
    pixels = read(tmp_path, *arguments, **options)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def refusal(tmp_path, *arguments, **options) -> str:
    with pytest.raises(ReclipError) as caught:
        read(tmp_path, *arguments, **options)
    message = str(caught.value)
    assert message.startswith(f"image {tmp_path / 'a.tif'} ") and message.endswith(": convert it to 8-bit RGB")
    return message


@pytest.mark.parametrize(("order", "compressed"), LAYOUTS)
def test_grey_tiffs(tmp_path, order, compressed):
    layout = {"order": order, "compressed": compressed}
    eight = np.array(GREY_8, np.uint8)
    assert grey(tmp_path, eight, BLACK_IS_ZERO, **layout) == GREY_8
    assert grey(tmp_path, eight, WHITE_IS_ZERO, **layout) == (255 - eight).tolist()
    assert grey(tmp_path, GREY, BLACK_IS_ZERO, **layout) == GREY_8
    bits = np.array([[0b10100000, 0b01000000]], np.uint8)
    assert grey(tmp_path, bits, BLACK_IS_ZERO, {256: 16}, bits=1, **layout) == [
        [255, 0, 255, *5 * [0], 0, 255, *6 * [0]]
    ]
    assert grey(tmp_path, bits, WHITE_IS_ZERO, {256: 3}, bits=1, **layout) == [[0, 255, 0]]


@pytest.mark.parametrize("compressed", [False, True])
def test_white_is_zero_in_16_bits(tmp_path, compressed):
    inverted = [[255, 254, 155], [127, 1, 0]]
    assert grey(tmp_path, GREY, WHITE_IS_ZERO, compressed=compressed) == inverted
    # A missing photometric interpretation is 0, as Pillow takes it for 8 bits.
    assert grey(tmp_path, GREY, WHITE_IS_ZERO, {PHOTOMETRIC: None}, compressed=compressed) == inverted
    message = refusal(tmp_path, GREY, WHITE_IS_ZERO, order=">", compressed=compressed)
    assert "is a TIFF with inverted samples (WhiteIsZero) of 16 bits" in message


@pytest.mark.parametrize("tag", [MAX_SAMPLE, SMAX_SAMPLE])
@pytest.mark.parametrize("order", "<>")
def test_12_bits_in_16(tmp_path, tag, order):
    samples = np.array([[0, 819, 4095]], np.uint16)  # 819 is a fifth of 4095
    assert grey(tmp_path, samples, BLACK_IS_ZERO, {tag: 4095}, order=order) == [[0, 51, 255]]
    # The largest sample of the very image: its bits count.
    assert grey(tmp_path, samples, BLACK_IS_ZERO, {tag: 3500}, order=order) == [[0, 51, 255]]
    assert grey(tmp_path, samples, BLACK_IS_ZERO, {tag: 65535}, order=order) == [[0, 3, 16]]
    # Without a declaration the samples are a measurement, stretched by percentiles: here nearly their extremes.
    assert grey(tmp_path, samples, BLACK_IS_ZERO, order=order) == [[0, stretched(samples)[1], 255]]
    # Samples above what is declared: the tag is wrong.
    assert grey(tmp_path, GREY, BLACK_IS_ZERO, {tag: 4095}, order=order) == GREY_8
    if order == "<":
        assert grey(tmp_path, samples, WHITE_IS_ZERO, {tag: 4095}) == [[255, 204, 0]]


def test_12_bits_packed(tmp_path):
    assert grey(tmp_path, np.array([[0, 819, 4095, 4095]], np.uint16), BLACK_IS_ZERO, bits=12) == [[0, 51, 255, 255]]


def stretched(samples) -> list:
    """Percentile 2 is black, 98 white."""
    low, high = np.percentile(samples, (2, 98))
    return np.rint((samples.ravel() - low).clip(0, high - low) * 255 / (high - low)).astype(int).tolist()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.float32])
def test_measurements_are_stretched(tmp_path, dtype, order):
    """Of any size, so that strips and the sample have several rows."""
    rng = np.random.default_rng(0)
    samples = (rng.normal(900, 100, (40, 300))).astype(dtype)
    if dtype == np.uint32 and order == ">":
        assert "1 band of 32-bit unsigned samples" in refusal(tmp_path, samples, BLACK_IS_ZERO, order=order)
        return  # Pillow does not read these
    if dtype == np.float32:
        samples = samples / 1e4 - 0.05
    found = np.array(grey(tmp_path, samples, BLACK_IS_ZERO, order=order))
    assert np.abs(found.ravel() - stretched(samples)).max() <= 1
    assert (found == 0).mean() == pytest.approx(0.02, abs=0.01) and found.max() == 255
    if order == "<":
        assert np.array_equal(grey(tmp_path, samples, BLACK_IS_ZERO, compressed=True), found)


def test_measurements_with_nothing_in_them(tmp_path):
    flat = np.full((3, 4), 7, np.uint16)
    assert grey(tmp_path, flat, BLACK_IS_ZERO) == [[0] * 4] * 3
    holes = np.array([[np.nan, 0.25, 0.5, np.inf]], np.float32)
    assert grey(tmp_path, holes, BLACK_IS_ZERO) == [[0, 0, 255, 255]]


def test_signed_and_32_bit_samples(tmp_path):
    signed = np.array([[-32768, -1, 0, 16384, 32767]], np.int16)
    for order in "<>":
        declared = {SMAX_SAMPLE: 32767}
        assert grey(tmp_path, signed, BLACK_IS_ZERO, declared, order=order) == [[0, 0, 0, 128, 255]]
    assert grey(tmp_path, signed // 8, BLACK_IS_ZERO, {SMAX_SAMPLE: 4095}) == [[0, 0, 0, 128, 255]]
    assert grey(tmp_path, GREY.astype(np.uint32), BLACK_IS_ZERO) == GREY_8
    full = np.array([[0, 1 << 31, (1 << 32) - 1]], np.uint32)
    assert grey(tmp_path, full, BLACK_IS_ZERO, {MAX_SAMPLE: (1 << 32) - 1}) == [[0, 128, 255]]
    assert grey(tmp_path, full, BLACK_IS_ZERO) == [[0, 128, 255]]
    message = refusal(tmp_path, full, BLACK_IS_ZERO, {MAX_SAMPLE: 65535})
    assert "has samples of 32 bits up to 4294967295, but does not declare which value is white" in message
    assert "signed 8-bit samples" in refusal(tmp_path, np.array([[-1, 3]], np.int8), BLACK_IS_ZERO)
    assert "compressed big-endian samples of 16 bits" in refusal(
        tmp_path, signed, BLACK_IS_ZERO, order=">", compressed=True
    )
    assert "compressed big-endian floating-point samples" in refusal(
        tmp_path, signed.astype(np.float32), BLACK_IS_ZERO, order=">", compressed=True
    )


@pytest.mark.parametrize(("order", "compressed"), LAYOUTS)
def test_colour_tiffs(tmp_path, order, compressed):
    layout = {"order": order, "compressed": compressed}
    deep = COLORS.astype(np.uint16) * 257
    for planar in (False, True):
        assert (read(tmp_path, COLORS, RGB, planar=planar, **layout) == COLORS).all()
        if compressed or not planar:
            assert (read(tmp_path, deep, RGB, planar=planar, **layout) == COLORS).all()
        else:
            assert "uncompressed planes of 16 bits" in refusal(tmp_path, deep, RGB, planar=True, **layout)
    ink = np.dstack([255 - COLORS, np.zeros((1, 4), np.uint8)])
    assert (read(tmp_path, ink, CMYK, **layout) == COLORS).all()
    assert (read(tmp_path, ink.astype(np.uint16) * 257, CMYK, **layout) == COLORS).all()
    table = np.zeros((3, 256), np.uint16)
    table[:, :4] = COLORS[0].T.astype(np.uint16) * 256
    indices = np.arange(4, dtype=np.uint8)[None]
    assert (read(tmp_path, indices, PALETTE, {COLOR_MAP: tuple(table.ravel().tolist())}, **layout) == COLORS).all()


def test_lab(tmp_path):
    """L*a*b* (D50) of sRGB's primaries and a grey, after Lindbloom: L* 255/100, a* and b* signed."""
    lab = np.array([[[138, 81, 70], [224, 256 - 79, 81], [75, 68, 256 - 112], [137, 0, 0]]], np.uint8)
    expected = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]])
    for layout in ({}, {"order": ">"}, {"compressed": True}):
        # Rounded to integers, which moves dark channels most.
        assert np.abs(read(tmp_path, lab, LAB, **layout).astype(int) - expected).max() < 24


def test_12_bit_colours_are_refused(tmp_path):
    """Pillow keeps the upper 8 of 16 bits: of 12 bits four, near black."""
    colors = (COLORS.astype(np.uint16) * 16).clip(0, 4095)
    assert "has colours of 12 bits in 16" in refusal(tmp_path, colors, RGB, {MAX_SAMPLE: (4095, 4095, 4095)})
    deep = COLORS.astype(np.uint16) * 257
    assert (read(tmp_path, deep, RGB, {MAX_SAMPLE: (4095, 4095, 4095)}) == COLORS).all()  # the tag is wrong


@pytest.mark.parametrize(
    ("pixels", "photometric", "tags", "kind"),
    [
        (np.zeros((2, 2, 5), np.uint8), BLACK_IS_ZERO, {EXTRA_SAMPLES: (0,) * 4}, "5 bands, of which only three"),
        (np.zeros((2, 2, 8), np.uint16), BLACK_IS_ZERO, {EXTRA_SAMPLES: (0,) * 7}, "8 bands, of which only three"),
        (np.zeros((2, 2, 12), np.uint8), RGB, {EXTRA_SAMPLES: (0,) * 9}, "12 bands, of which only three"),
        (np.zeros((2, 2, 3), np.float32), RGB, {}, "3 bands of 32-bit floating-point samples"),
        (np.zeros((2, 2), np.float64), BLACK_IS_ZERO, {}, "1 band of 64-bit floating-point samples"),
        (np.zeros((2, 2, 2), np.uint16), BLACK_IS_ZERO, {EXTRA_SAMPLES: 2}, "2 bands of 16-bit unsigned samples"),
        (np.zeros((2, 2, 3), np.int16), RGB, {}, "3 bands of 16-bit signed samples"),
        (np.zeros((2, 2), np.uint16), 32803, {}, "a camera's raw data (photometric interpretation 32803)"),
        (COLORS, YCBCR, {}, "uncompressed YCbCr samples"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, pixels, photometric, tags, kind):
    assert kind in refusal(tmp_path, pixels, photometric, tags)


def test_further_bands_of_an_rgb_tiff(tmp_path):
    """Three of red, green and blue: they come first."""
    infrared = np.full((1, 4, 1), 77, np.uint8)
    four, five = np.dstack([COLORS, infrared]), np.dstack([COLORS, infrared, infrared])
    assert (read(tmp_path, four, RGB, {EXTRA_SAMPLES: 0}) == COLORS).all()
    assert (read(tmp_path, five, RGB, {EXTRA_SAMPLES: (0, 0)}) == COLORS).all()
    assert (read(tmp_path, four, RGB) == COLORS).all()  # not declared: not transparency


def test_transparency_of_a_tiff(tmp_path):
    alpha = np.array([[[255], [255], [0], [0]]], np.uint8)
    expected = np.concatenate([COLORS[:, :2], np.full((1, 2, 3), 255)], axis=1)
    assert (read(tmp_path, np.dstack([COLORS, alpha]), RGB, {EXTRA_SAMPLES: 2}) == expected).all()
    premultiplied = np.dstack([COLORS * (alpha > 0), alpha])
    assert (read(tmp_path, premultiplied, RGB, {EXTRA_SAMPLES: 1}) == expected).all()
    assert has_alpha(tmp_path / "a.tif")


def png_bytes(samples: np.ndarray, bits: int, color_type: int, chunks: list[tuple[bytes, bytes]] = []) -> bytes:  # noqa: B006
    """A PNG written byte by byte; ``samples`` are the packed rows ``(H, bytes)`` uint8."""
    width = samples.shape[1] * 8 // (bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type])
    header = struct.pack(">IIBBBBB", width, len(samples), bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in samples))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def big_endian(samples: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(samples.astype(">u2")).view(np.uint8).reshape(len(samples), -1)


def read_png(tmp_path, *arguments) -> np.ndarray:
    (tmp_path / "a.png").write_bytes(png_bytes(*arguments))
    return read_image(tmp_path / "a.png")


def test_significant_bits_of_a_png(tmp_path):
    """By the specification, samples are scaled to 16 bits regardless of the chunk; some writers do not scale them."""
    scaled = np.array([[0, 819 << 4, 4095 << 4 | 15]], np.uint16)
    bits = [(b"gAMA", b"\0\0\xb1\x8f"), (b"sBIT", b"\x0c")]
    assert read_png(tmp_path, big_endian(scaled), 16, 0, bits)[..., 0].tolist() == [[0, 51, 255]]
    assert read_png(tmp_path, big_endian(scaled >> 4), 16, 0, bits)[..., 0].tolist() == [[0, 51, 255]]
    assert read_png(tmp_path, big_endian(scaled >> 4), 16, 0)[..., 0].tolist() == [[0, 3, 16]]
    colors = np.array([[4095, 0, 0, 100, 200, 300]], np.uint16)
    with pytest.raises(ReclipError, match="has colours of 12 bits in 16: convert it to 8-bit RGB"):
        read_png(tmp_path, big_endian(colors), 16, 2, [(b"sBIT", b"\x0c\x0c\x0c")])


@pytest.mark.parametrize(
    ("bits", "row", "expected"), [(1, 0b01000000, [0, 255]), (2, 0b00110110, [0, 255, 85, 170]), (4, 0xC3, [204, 51])]
)
def test_grey_pngs_of_few_bits(tmp_path, bits, row, expected):
    samples = np.array([[row]], np.uint8)
    assert read_png(tmp_path, samples, bits, 0)[0, : len(expected), 0].tolist() == expected


def test_transparent_sample_of_a_png(tmp_path):
    """Chunk tRNS: a grey level or a colour, in the file's own depth."""
    key = [(b"tRNS", b"\0\x01")]
    assert read_png(tmp_path, np.array([[0b00110110]], np.uint8), 2, 0, key)[..., 0].tolist() == [[0, 255, 255, 170]]
    assert read_png(tmp_path, np.array([[0, 1, 2]], np.uint8), 8, 0, key)[..., 0].tolist() == [[0, 255, 2]]
    samples = np.array([[0, 1, 25700]], np.uint16)
    assert read_png(tmp_path, big_endian(samples), 16, 0, key)[..., 0].tolist() == [[0, 255, 100]]
    key = [(b"tRNS", b"\0\0\0\xff\0\0")]
    expected = COLORS.copy()
    expected[0, 1] = 255
    assert (read_png(tmp_path, COLORS.reshape(1, -1), 8, 2, key) == expected).all()
    deep = big_endian(COLORS.reshape(1, -1).astype(np.uint16) * 257)
    assert (read_png(tmp_path, deep, 16, 2, [(b"tRNS", b"\0\0\xff\xff\0\0")]) == COLORS).all()


def test_palette_with_transparency(tmp_path):
    palette = [(b"PLTE", COLORS.tobytes()), (b"tRNS", b"\xff\x00\x80")]
    expected = [[255, 0, 0], [255, 255, 255], [127, 127, 255], [9, 8, 7]]
    assert read_png(tmp_path, np.arange(4, dtype=np.uint8)[None], 8, 3, palette)[0].tolist() == expected


def test_images_with_alpha_are_counted(tmp_path):
    rgba = Image.fromarray(np.zeros((4, 4, 4), np.uint8))
    rgba.save(tmp_path / "a.png")
    rgba.convert("LA").save(tmp_path / "b.png")
    rgba.save(tmp_path / "c.webp", lossless=True)
    rgba.convert("RGB").save(tmp_path / "d.png")
    rgba.convert("RGB").save(tmp_path / "e.jpg")
    (tmp_path / "f.png").write_bytes(b"no image")
    files = sorted(tmp_path.iterdir())
    assert describe_alpha(files) == "3 images have an alpha channel: transparent regions are read as white"
    assert describe_alpha(files[:1]) == "1 image has an alpha channel: transparent regions are read as white"
    assert describe_alpha(files[3:]) == ""
