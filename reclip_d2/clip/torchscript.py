"""Tensors of a TorchScript archive, read without running anything that stands in it.

OpenAI publishes CLIP as TorchScript archives. ``torch.jit.load`` compiles their code; here the archive is taken for
what it is, a ZIP with a pickle (``data.pkl``: the tree of modules) and one raw file a storage (``data/<key>``). The
pickle is read by an unpickler that knows plain containers, inert stand-ins for modules, and descriptions of tensors;
every other name in it is an error.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import zipfile
from typing import Any, NoReturn

import torch
from torch import Tensor

_STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Inert:
    """Base of all that the pickle may name: its state can be set by no opcode."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class _Storage(_Inert):
    """Description of a storage; its bytes are read later."""

    __slots__ = ("dtype", "key")

    def __init__(self, dtype: torch.dtype, key: str) -> None:
        self.dtype, self.key = dtype, key


class _StorageType(_Inert):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _TensorView(_Inert):
    """Description of a tensor: a storage, and where the tensor lies in it."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _RebuildTensor(_Inert):
    """Stands for ``torch._utils._rebuild_tensor_v2``."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _TensorView:
        sound = isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
        if not sound or len(size) != len(stride) or not all(isinstance(n, int) for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor is described wrongly")
        return _TensorView(storage, offset, size, stride)


class _PassThrough(_Inert):
    """Stands for the list builders of ``torch.jit._pickle``: the list as it is."""

    __slots__ = ()

    def __call__(self, value: Any, *rest: Any) -> Any:
        return value


class _MakeDict(_Inert):
    """Stands for ``collections.OrderedDict``, which TorchScript writes only for a tensor's (empty) hooks."""

    __slots__ = ()

    def __call__(self) -> dict:
        return {}


class _Module:
    """Stands for a module: its attributes, and nothing else."""

    __slots__ = ("attributes",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module's state is no dictionary")
        self.attributes = state


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of ``data.pkl`` that admits stand-ins only."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            # A class of its own: NEWOBJ calls it, and nothing can be hung on the one shared by all modules.
            return type("_ModuleOf", (_Module,), {"__slots__": ()})
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("collections", "OrderedDict"):
            return _MakeDict()
        if module == "torch.jit._pickle":
            return _PassThrough()
        raise pickle.UnpicklingError(f"the archive names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("a storage is described wrongly")
        return _Storage(pid[1].dtype, str(pid[2]))


def is_torchscript(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a TorchScript archive: a ZIP with ``data.pkl`` and ``code/``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any("/code/" in name for name in names) and any(name.endswith("/data.pkl") for name in names)


def read_torchscript_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a TorchScript archive, on the CPU, under the names that its modules' attributes give them.

    These are the entries of its state dict, and any other tensors that modules hold as plain attributes (CLIP's
    attention masks).

    Raises:
        pickle.UnpicklingError: the pickle names something else than modules, tensors and containers.
        ValueError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            prefix = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            byte_order = f"{prefix}byteorder"
            if byte_order in archive.namelist() and archive.read(byte_order) != b"little":
                raise ValueError("its numbers are not little-endian")
            root = _TensorUnpickler(io.BytesIO(archive.read(f"{prefix}data.pkl"))).load()
            storages: dict[str, Tensor] = {}
            return {
                name: _materialise(view, archive, f"{prefix}data/", storages) for name, view in _walk(root, "").items()
            }
    except (zipfile.BadZipFile, KeyError, StopIteration, EOFError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no readable TorchScript archive ({type(error).__name__})") from error


def _walk(root: Any, name: str) -> dict[str, _TensorView]:
    """Tensor descriptions below a module by their dotted names."""
    found: dict[str, _TensorView] = {}
    stack, seen = collections.deque([(name, root)]), set()
    while stack:
        name, node = stack.popleft()
        if isinstance(node, _TensorView):
            found[name] = node
        elif isinstance(node, _Module) and id(node) not in seen:
            seen.add(id(node))
            stack.extend((f"{name}.{key}" if name else str(key), value) for key, value in node.attributes.items())
    return found


def _materialise(view: _TensorView, archive: zipfile.ZipFile, folder: str, storages: dict[str, Tensor]) -> Tensor:
    """The tensor of a description, which must lie within its storage."""
    storage = view.storage
    if storage.key not in storages:
        content = bytearray(archive.read(folder + storage.key))
        if len(content) % torch.empty(0, dtype=storage.dtype).element_size():
            raise ValueError(f"storage {storage.key} is cut")
        storages[storage.key] = torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0)
    values = storages[storage.key]
    if min((view.offset, *view.size, *view.stride)) < 0:
        raise ValueError("a tensor has a negative size")
    count = math.prod(view.size)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    if values.dtype != storage.dtype and count:
        raise ValueError(f"storage {storage.key} has two types")
    if count > len(values) or (count and last >= len(values)):
        raise ValueError(f"a tensor reaches beyond storage {storage.key}")
    return torch.as_strided(values, view.size, view.stride, view.offset).clone()
