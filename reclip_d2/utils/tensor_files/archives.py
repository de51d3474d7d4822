"""Tensors in files of ``torch.save`` and TorchScript, and in pickled arrays.

``torch.save`` and TorchScript write a ZIP with a pickle (``data.pkl``) and one raw file per storage (``data/<key>``).
Before version 1.6, PyTorch wrote five pickles followed by the storages.
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

# Tensors may share a storage: their total size is limited to this multiple of the file's size, plus a constant.
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
            size: size of the file in bytes.

        Returns:
            The saved object, see :meth:`_Builder.build`, and whether the archive is TorchScript. Then the object is a
            dictionary of the modules' tensors by attribute path: the state dict's entries and other tensors.

    Raises:
        DamagedError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError: the archive is damaged or contains code.
    """
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        roots = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise DamagedError("is a ZIP archive without tensors")
        prefix = roots[0].removesuffix("data.pkl")
        entries = {
            info.filename.removeprefix(prefix): info
            for info in infos
            if info.filename in (f"{prefix}data.pkl", f"{prefix}byteorder")
            or info.filename.startswith(f"{prefix}data/")
        }
        if len(set(names)) != len(names):
            raise DamagedError("has two entries with the same name")
        _check_sizes(entries, size)
        if not any(info.CRC for info in infos):  # saved after torch.serialization.set_crc32_options(False)
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
                raise DamagedError(f"is truncated: its entry {name} is too short")
            return content

        if "byteorder" in entries and bytes(read("byteorder")) != b"little":
            raise DamagedError("contains numbers that are not little-endian")
        builder = _Builder(lambda storage: read(f"data/{storage.key}"), size)
        root = unpickle(bytes(read("data.pkl")))
        return builder.build(root), isinstance(root, Module)


def _check_sizes(entries: dict[str, zipfile.ZipInfo], size: int) -> None:
    """Raise unless the declared unpacked size is about the file's size: entries are not compressed."""
    total = sum(info.file_size for info in entries.values())
    if total > size + _SLACK:
        raise DamagedError(
            f"has {format_bytes(size)} and would unpack to {format_bytes(total)}: PyTorch never writes such a file"
        )
    if "data.pkl" in entries and entries["data.pkl"].file_size > MAX_PICKLE:
        raise DamagedError(f"has a table of contents of {format_bytes(entries['data.pkl'].file_size)}")


def read_legacy(stream: BinaryIO, size: int) -> Any:
    """Content of a file written by PyTorch before 1.6; see :meth:`_Builder.build`."""

    def next_pickle() -> Any:
        start = stream.tell()
        length = pickle_end(stream) - start
        if length > MAX_PICKLE:
            raise DamagedError(f"has a table of contents of {format_bytes(length)}")
        stream.seek(start)
        return unpickle(stream.read(length))

    if next_pickle() != _LEGACY_MAGIC:
        raise DamagedError("is not a file of torch.save")
    next_pickle()  # the version of the protocol
    machine = next_pickle()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise DamagedError("contains numbers that are not little-endian")
    content, keys = next_pickle(), next_pickle()
    places: dict[str, tuple[int, int]] = {}
    types = _storage_types(content)
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        length = count * _item_size(types.get(str(key), torch.uint8))
        places[str(key)] = (stream.tell(), length)
        if stream.tell() + length > size:
            raise DamagedError(f"is truncated: it has {format_bytes(size)} but declares more")
        stream.seek(length, 1)

    def read(storage: Storage) -> bytearray:
        if storage.key not in places:
            raise DamagedError(f"lacks storage {storage.key}")
        start, length = places[storage.key]
        stream.seek(start)
        return bytearray(stream.read(length))

    return _Builder(read, size).build(content)


def read_pickle(stream: BinaryIO, size: int) -> Any:
    """Content of a pickle of NumPy arrays, as in Detectron2's model zoo; see :meth:`_Builder.build`."""

    def read(storage: Storage) -> bytearray:
        raise DamagedError("describes tensors that it does not contain")

    return _Builder(read, size).build(unpickle(stream.read()))


def _item_size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _storage_types(root: Any) -> dict[str, torch.dtype]:
    """Types of the storages of a tree's tensors."""
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
    """Makes tensors and arrays from their descriptions, in plain containers."""

    def __init__(self, read: Callable[[Storage], bytearray], size: int) -> None:
        """
        Args:
            read: returns the bytes of a storage.
            size: size of the file in bytes.
        """
        self._read = read
        self._room = _MAX_SHARING * size + _SLACK
        self._storages: dict[str, bytearray] = {}
        self._built: dict[int, Any] = {}

    def build(self, root: Any) -> Any:
        """Dictionaries, lists, tuples, plain values, tensors (CPU) and arrays; :class:`Unsupported` for tensors that
        cannot be read, so that errors can name them; None for anything else."""
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
        # Containers that occur repeatedly are built once.
        if id(node) not in self._built:
            if depth > _MAX_DEPTH:
                raise DamagedError("is nested too deeply")
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
            raise DamagedError("describes tensors many times larger than itself")

    def _array(self, description: Array) -> np.ndarray | Unsupported:
        array = description.array()
        if isinstance(array, np.ndarray):
            self._take(array.nbytes)
        return array

    def _tensor(self, view: TensorView) -> Tensor:
        """The described tensor, which must fit into its storage."""
        storage, item = view.storage, _item_size(view.dtype)
        is_first = storage.key not in self._storages
        if is_first:
            self._storages[storage.key] = self._read(storage)
        content = self._storages[storage.key]
        if len(content) % item:
            raise DamagedError(f"is damaged: storage {storage.key} is truncated")
        values = torch.frombuffer(content, dtype=view.dtype) if content else torch.empty(0, dtype=view.dtype)
        count = math.prod(view.size)
        last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
        if count > len(values) or (count and last >= len(values)):
            raise DamagedError(f"is damaged: a tensor reaches beyond storage {storage.key}")
        self._take(count * item)
        tensor = torch.as_strided(values, view.size, view.stride, view.offset)
        # A storage with one tensor, the usual case, becomes that tensor; views of a shared storage are copied.
        return tensor if is_first and count == len(values) else tensor.clone()


def _module_tensors(root: Module) -> dict[str, TensorView]:
    """Tensor descriptions below a module, by dotted name."""
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
