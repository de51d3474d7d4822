"""TIFF files written byte by byte: kinds that no library here writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS = 256, 257, 258, 259, 262, 273
SAMPLES, ROWS, COUNTS, MIN_SAMPLE, MAX_SAMPLE, PLANAR = 277, 278, 279, 280, 281, 284
COLOR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT, SMIN_SAMPLE, SMAX_SAMPLE = 320, 338, 339, 340, 341
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
_TYPES = {"H": 3, "I": 4, "d": 12}


def tiff_bytes(
    pixels: np.ndarray,
    photometric: int,
    tags: Mapping[int, int | float | tuple] | None = None,
    *,
    order: str = "<",
    compressed: bool = False,
    planar: bool = False,
    bits: int | None = None,
) -> bytes:
    """A TIFF of one page.

    Args:
        pixels: ``(H, W)`` or ``(H, W, bands)``, written in their dtype.
        tags: further tags, or others in place of the usual; None leaves a tag out. A tuple makes several values.
        order: "<" or ">".
        compressed: by deflate; otherwise not.
        planar: band after band.
        bits: of a sample; 12 are packed.
    """
    height, width, *rest = pixels.shape
    bands = rest[0] if rest else 1
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    bits = bits or pixels.dtype.itemsize * 8
    planes = [pixels[..., band] for band in range(bands)] if planar and rest else [pixels]
    strips = [_pack(plane.astype(plane.dtype.newbyteorder(order)), bits) for plane in planes]
    if compressed:
        strips = [zlib.compress(strip) for strip in strips]
    starts = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    fields: dict[int, int | float | tuple] = {
        WIDTH: width,
        HEIGHT: height,
        BITS: (bits,) * bands,
        COMPRESSION: 8 if compressed else 1,
        PHOTOMETRIC: photometric,
        OFFSETS: tuple(starts),
        SAMPLES: bands,
        ROWS: height,
        COUNTS: tuple(map(len, strips)),
        PLANAR: 2 if planar else 1,
        SAMPLE_FORMAT: (kind,) * bands,
    }
    fields = {tag: value for tag, value in sorted({**fields, **(tags or {})}.items()) if value is not None}
    body = b"".join(strips)
    body += b"\0" * (len(body) % 2)
    start = 8 + len(body)
    directory, extra = struct.pack(order + "H", len(fields)), b""
    extra_start = start + 2 + 12 * len(fields) + 4
    for tag, value in fields.items():
        values = value if isinstance(value, tuple) else (value,)
        code = "d" if any(isinstance(v, float) for v in values) else "I" if max(values) > 65535 else "H"
        data = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(data) > 4:
            place, extra = struct.pack(order + "I", extra_start + len(extra)), extra + data
        else:
            place = data.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, _TYPES[code], len(values)) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return head + body + directory + struct.pack(order + "I", 0) + extra


def _pack(samples: np.ndarray, bits: int) -> bytes:
    """Bytes of a strip; 12-bit samples take three bytes a pair."""
    if bits != 12:
        return samples.tobytes()
    flat = np.pad(samples.astype(np.uint32).reshape(samples.shape[0], -1), ((0, 0), (0, samples.shape[1] % 2)))
    first, second = flat[:, ::2], flat[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
