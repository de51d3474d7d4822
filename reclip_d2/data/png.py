"""What a PNG's chunks say that Pillow does not tell."""

from __future__ import annotations

import struct
from typing import BinaryIO

_SIGNATURE = 8
# Chunks that may stand before the significant bits; a file with more is not worth the search.
_MAX_CHUNKS = 100


def significant_bits(stream: BinaryIO) -> int | None:
    """The largest number of significant bits of any channel (chunk sBIT); None without the chunk.

    Args:
        stream: the file; its position is kept.
    """
    place = stream.tell()
    try:
        stream.seek(_SIGNATURE)
        for _ in range(_MAX_CHUNKS):
            header = stream.read(8)
            if len(header) < 8:
                return None
            length, name = struct.unpack(">I4s", header)
            if name in (b"PLTE", b"IDAT", b"IEND"):  # sBIT comes before
                return None
            if name == b"sBIT":
                bits = stream.read(min(length, 4))
                return max(bits, default=0) or None
            stream.seek(length + 4, 1)
    finally:
        stream.seek(place)
    return None
