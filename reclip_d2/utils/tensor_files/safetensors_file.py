"""Tensors of a safetensors file, whose header is checked before the library reads it."""

from __future__ import annotations

import json
import math
import os
from typing import Any, BinaryIO

import safetensors
from torch import Tensor

from reclip_d2.utils.files import format_bytes
from reclip_d2.utils.tensor_files.archives import DamagedError

# A CLIP's header has 0.1 MB; the library allows 100 MB, for which Python needs gigabytes.
MAX_HEADER = 16 << 20
_MAX_TENSORS = 200_000
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
         "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8}  # fmt: skip


def read_safetensors(path: str | os.PathLike[str], stream: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict]:
    """Tensors by name, and the header's metadata.

    Args:
        path: the file's path, for the library.
        stream: the file, at its beginning.
        size: the file's size in bytes.

    Raises:
        DamagedError: the header is damaged, or does not fit the file.
    """
    header = _read_header(stream, size)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in header}, file.metadata() or {}
    except (safetensors.SafetensorError, AttributeError, KeyError) as error:  # the last two: a type that torch lacks
        raise DamagedError(f"is damaged ({' '.join(str(error).split())})") from error


def _read_header(stream: BinaryIO, size: int) -> dict[str, Any]:
    """Entries of the header, each of which lies within the file and has the bytes that its shape needs."""
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER:
        raise DamagedError(f"declares a header of {format_bytes(length)}: it is damaged, or not a safetensors file")
    if 8 + length > size:
        raise DamagedError("is truncated: copy or download it again")
    try:
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [0]
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            bits = _BITS.get(entry["dtype"])
            if not 0 <= start <= end or (bits is not None and end - start != count * bits // 8):
                raise DamagedError(f"is damaged: {name[:60]!r} has another size in its header")
            ends.append(end)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError("has a damaged header") from error
    if len(header) > _MAX_TENSORS:
        raise DamagedError(f"contains {len(header):,} tensors, more than any model has")
    if 8 + length + max(ends) > size:
        raise DamagedError("is truncated: copy or download it again")
    return header
