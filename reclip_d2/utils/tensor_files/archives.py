"""Tensors of the files that ``torch.save`` and TorchScript write, and of pickled arrays.

``torch.save`` and TorchScript write a ZIP with a pickle (``data.pkl``) and one raw file a storage (``data/<key>``);
before version 1.6 PyTorch wrote five pickles and the storages behind each other.
"""

from __future__ import annotations

import collections
import math
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from reclip_d2.utils.files import format_bytes
from reclip_d2.utils.tensor_files.pickled import (
    MAX_PICKLE,
    Array,
    Module,
    Storage,
    TensorView,
    Unsupported,
    pickle_end,
    unpickle,
)

# Tensors may share a storage: all together they may take so many times the file's size, and a little more.
_MAX_SHARING = 4
_SLACK = 64 << 20
_MAX_DEPTH = 100
_CHUNK = 4 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class DamagedError(ValueError):
    """A weight file is damaged; the message says how, to follow "it"."""


def read_archive(stream: BinaryIO, size: int) -> tuple[Any, bool]:
    """Content of a ZIP archive of ``torch.save`` or TorchScript.

    Args:
        size: of the file, in bytes.

    Returns:
        what was saved, see :meth:`_Builder.build`, and whether it is TorchScript's: then these are the tensors by the
        names that the modules' attributes give them, the entries of the state dict and other tensors of modules.

    Raises:
        DamagedError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError: the archive is damaged or holds code.
    """
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        roots = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise DamagedError("is a ZIP archive of other things than tensors")
        prefix = roots[0].removesuffix("data.pkl")
        entries = {
            info.filename.removeprefix(prefix): info
            for info in infos
            if info.filename in (f"{prefix}data.pkl", f"{prefix}byteorder")
            or info.filename.startswith(f"{prefix}data/")
        }
        if len(set(names)) != len(names):
            raise DamagedError("has two entries of one name")
        _check_sizes(entries, size)
        if not any(info.CRC for info in infos):  # torch.serialization.set_crc32_options(False) has left them out
            for info in infos:
                info.CRC = None

        def read(name: str) -> bytearray:
            if name not in entries:
                raise DamagedError(f"lacks its entry {name}")
            content = bytearray(entries[name].file_size)
            position = 0
            try:
                with archive.open(entries[name]) as entry:
                    while chunk := entry.read(_CHUNK):
                        content[position : position + len(chunk)] = chunk
                        position += len(chunk)
            except zipfile.BadZipFile as error:
                raise DamagedError(f"is damaged: the checksum of its entry {name} is wrong") from error
            if position != len(content):
                raise DamagedError(f"is cut short: its entry {name} lacks bytes")
            return content

        if "byteorder" in entries and bytes(read("byteorder")) != b"little":
            raise DamagedError("holds numbers that are not little-endian")
        builder = _Builder(lambda storage: read(f"data/{storage.key}"), size)
        root = unpickle(bytes(read("data.pkl")))
        return builder.build(root), isinstance(root, Module)


def _check_sizes(entries: dict[str, zipfile.ZipInfo], size: int) -> None:
    """Raise unless what the entries say that they unpack to is about what the file has: they are not compressed."""
    total = sum(info.file_size for info in entries.values())
    if total > size + _SLACK:
        raise DamagedError(
            f"has {format_bytes(size)} and would unpack to {format_bytes(total)}: no program of PyTorch writes this"
        )
    if "data.pkl" in entries and entries["data.pkl"].file_size > MAX_PICKLE:
        raise DamagedError(f"has a table of contents of {format_bytes(entries['data.pkl'].file_size)}")


def read_legacy(stream: BinaryIO, size: int) -> Any:
    """Content of a file that PyTorch before 1.6 has written; see :meth:`_Builder.build`."""

    def next_pickle() -> Any:
        start = stream.tell()
        length = pickle_end(stream) - start
        if length > MAX_PICKLE:
            raise DamagedError(f"has a table of contents of {format_bytes(length)}")
        stream.seek(start)
        return unpickle(stream.read(length))

    if next_pickle() != _LEGACY_MAGIC:
        raise DamagedError("is no file of torch.save")
    next_pickle()  # the version of the protocol
    machine = next_pickle()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise DamagedError("holds numbers that are not little-endian")
    content, keys = next_pickle(), next_pickle()
    places: dict[str, tuple[int, int]] = {}
    types = _storage_types(content)
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        length = count * _item_size(types.get(str(key), torch.uint8))
        places[str(key)] = (stream.tell(), length)
        if stream.tell() + length > size:
            raise DamagedError(f"is cut short: it has {format_bytes(size)} and promises more")
        stream.seek(length, 1)

    def read(storage: Storage) -> bytearray:
        if storage.key not in places:
            raise DamagedError(f"lacks storage {storage.key}")
        start, length = places[storage.key]
        stream.seek(start)
        return bytearray(stream.read(length))

    return _Builder(read, size).build(content)


def read_pickle(stream: BinaryIO, size: int) -> Any:
    """Content of a pickle of NumPy arrays, as Detectron2's model zoo has them; see :meth:`_Builder.build`."""

    def read(storage: Storage) -> bytearray:
        raise DamagedError("describes tensors that are not in it")

    return _Builder(read, size).build(unpickle(stream.read()))


def _item_size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _storage_types(root: Any) -> dict[str, torch.dtype]:
    """Types of the storages that a tree's tensors lie in."""
    found: dict[str, torch.dtype] = {}
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if isinstance(node, TensorView):
            found[node.storage.key] = node.storage.dtype or torch.uint8
        elif isinstance(node, dict | list | tuple | Module) and id(node) not in seen:
            seen.add(id(node))
            stack.extend(_children(node))
    return found


def _children(node: Any) -> list[Any]:
    if isinstance(node, Module):
        node = node.attributes
    return list(node.values()) if isinstance(node, dict) else list(node)


class _Builder:
    """Makes tensors and arrays of their descriptions, and plain containers of all that holds them."""

    def __init__(self, read: Callable[[Storage], bytearray], size: int) -> None:
        """
        Args:
            read: gives the bytes of a storage.
            size: of the file.
        """
        self._read = read
        self._room = _MAX_SHARING * size + _SLACK
        self._storages: dict[str, bytearray] = {}
        self._built: dict[int, Any] = {}

    def build(self, root: Any) -> Any:
        """Dictionaries, lists, tuples, plain values, tensors (CPU) and arrays; :class:`Unsupported` for tensors that
        cannot be read, so that they can be refused by their names; None for what has no meaning here."""
        if isinstance(root, Module):
            return {name: self._tensor(view) for name, view in _module_tensors(root).items()}
        return self._build(root, 0)

    def _build(self, node: Any, depth: int) -> Any:
        if isinstance(node, TensorView):
            return self._tensor(node)
        if isinstance(node, Array):
            return self._array(node)
        if isinstance(node, Unsupported | str | int | float | bool | bytes | complex | None):
            return node
        if not isinstance(node, dict | list | tuple):
            return None
        # A container that is met again is built once: it may be anywhere, and often.
        if id(node) not in self._built:
            if depth > _MAX_DEPTH:
                raise DamagedError("is nested too deep")
            self._built[id(node)] = None
            if isinstance(node, dict):
                built = {key: self._build(value, depth + 1) for key, value in node.items()}
            else:
                built = [self._build(value, depth + 1) for value in node]
                built = tuple(built) if isinstance(node, tuple) else built
            self._built[id(node)] = built
        return self._built[id(node)]

    def _take(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise DamagedError("describes tensors that are many times larger than itself")

    def _array(self, description: Array) -> np.ndarray | Unsupported:
        array = description.array()
        if isinstance(array, np.ndarray):
            self._take(array.nbytes)
        return array

    def _tensor(self, view: TensorView) -> Tensor:
        """The tensor of a description, which must lie within its storage."""
        storage, item = view.storage, _item_size(view.dtype)
        is_first = storage.key not in self._storages
        if is_first:
            self._storages[storage.key] = self._read(storage)
        content = self._storages[storage.key]
        if len(content) % item:
            raise DamagedError(f"is damaged: storage {storage.key} is cut")
        values = torch.frombuffer(content, dtype=view.dtype) if content else torch.empty(0, dtype=view.dtype)
        count = math.prod(view.size)
        last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
        if count > len(values) or (count and last >= len(values)):
            raise DamagedError(f"is damaged: a tensor reaches beyond storage {storage.key}")
        self._take(count * item)
        tensor = torch.as_strided(values, view.size, view.stride, view.offset)
        # A storage of one tensor, the usual case, becomes that tensor; views of a shared one get memory of their own.
        return tensor if is_first and count == len(values) else tensor.clone()


def _module_tensors(root: Module) -> dict[str, TensorView]:
    """Tensor descriptions below a module by their dotted names."""
    found: dict[str, TensorView] = {}
    stack: collections.deque[tuple[str, Any]] = collections.deque([("", root)])
    seen = set()
    while stack:
        name, node = stack.popleft()
        if isinstance(node, TensorView):
            found[name] = node
        elif isinstance(node, Module) and id(node) not in seen:
            seen.add(id(node))
            stack.extend((f"{name}.{key}" if name else str(key), value) for key, value in node.attributes.items())
    return found
