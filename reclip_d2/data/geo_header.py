"""Whether a TIFF has a georeference, from its first directory of tags alone.

Pillow reads tags from files in which it can jump; this reads forward only, as from a server that sends whole files. The
layout is that of TIFF 6.0, and of BigTIFF.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from reclip_d2.data.tiff import GEO_TAGS
from reclip_d2.utils.files import StrPath, check_regular

EXTENSIONS = (".tif", ".tiff")
_WIDTH, _HEIGHT = 256, 257
# Formats of the tag types SHORT, LONG and LONG8, which a size may have.
_SIZE_TYPES = {3: "H", 4: "I", 16: "Q"}
_MAX_TAGS = 65_535
_MAX_SIDE = (1 << 31) - 1  # GDAL's
_CHUNK = 1 << 20


def geotiff_size(path: StrPath) -> tuple[int, int] | None:
    """(H, W) of a TIFF with a georeference; None for other files, and those that cannot be read."""
    if not str(path).lower().endswith(EXTENSIONS):
        return None
    try:
        check_regular(path, "image")
        with open(path, "rb") as stream:
            return read_geo_header(stream)
    except Exception:  # a damaged file: reported when it is read
        return None


def read_geo_header(stream: BinaryIO) -> tuple[int, int] | None:
    """(H, W) of a TIFF with a georeference; None for another file.

    Args:
        stream: at the beginning of the file; it need not be able to jump.

    Raises:
        struct.error: the header ends early.
    """
    head = stream.read(8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:4])[0] if order else 0
    if version not in (42, 43):
        return None
    count_format, entry_format = ("H", "HHI4s") if version == 42 else ("Q", "HHQ8s")
    if version == 42:
        (place,) = struct.unpack(f"{order}I", head[4:8])
    else:
        head += stream.read(8)
        (place,) = struct.unpack(f"{order}Q", head[8:16])
    _go_to(stream, len(head), place)
    (count,) = _read(stream, f"{order}{count_format}")
    values: dict[int, int] = {}
    found = False
    for _ in range(min(count, _MAX_TAGS)):
        tag, kind, _, value = _read(stream, f"{order}{entry_format}")
        found |= tag in GEO_TAGS
        if tag in (_WIDTH, _HEIGHT) and kind in _SIZE_TYPES:
            values[tag] = min(struct.unpack_from(f"{order}{_SIZE_TYPES[kind]}", value)[0], _MAX_SIDE)
    return (values.get(_HEIGHT, 0), values.get(_WIDTH, 0)) if found else None


def _read(stream: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _go_to(stream: BinaryIO, position: int, target: int) -> None:
    """Continue at ``target``: by a jump, or by reading up to there."""
    try:
        stream.seek(target)
    except (OSError, ValueError):
        while position < target and (data := stream.read(min(_CHUNK, target - position))):
            position += len(data)
