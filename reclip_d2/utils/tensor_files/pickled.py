"""Read the pickles of weight files without executing anything that they name.

A pickle may name any function and call it. Here it may name only plain containers, descriptions of tensors and arrays,
and a few harmless values of training programs. Each is an inert stand-in of this module; any other name is an error.
Nothing is imported on behalf of a file.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import pickletools
import re
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

# Largest pickles that only describe tensors: OpenAI's ViT-L/14 has 0.2 MB.
MAX_PICKLE = 128 << 20

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    # Of quantised tensors, which are rejected by name.
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
# Functions that rebuild unsupported tensors, and what they rebuild.
_UNSUPPORTED = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_wrapper_subclass": "a tensor of a special class",
    "_rebuild_device_tensor_from_numpy": "a tensor of an unsupported device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of an unsupported device",
    "_rebuild_xla_tensor": "a tensor of an unsupported device",
}
# Values that training programs save with the weights; their content is dropped.
_OPAQUE = frozenset(
    {
        ("argparse", "Namespace"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    }
)
_NUMPY_CODE = re.compile(r"[biufc]\d{1,2}|S\d{1,4}|U\d{1,4}")


class _Inert:
    """Base of the stand-ins: no opcode can set their state."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class _Function(_Inert):
    """Replaces a function that a pickle names: its result consists of stand-ins too."""

    __slots__ = ("_make",)

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)


class Opaque:
    """Replaces an object that is not needed: its arguments, state and items are dropped."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Module:
    """Replaces a module of a TorchScript archive: its attributes and nothing else."""

    __slots__ = ("attributes",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module's state is no dictionary")
        self.attributes = state


class Mapping(dict):
    """Replaces ``OrderedDict`` and similar types. Their attributes (a state dict's ``_metadata``) are dropped."""

    __slots__ = ()

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__()
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            self[_checked_key(key)] = value

    def __setstate__(self, state: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
    """Describes a tensor that cannot be read."""

    what: str

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a tensor takes no state")


class StorageType(_Inert):
    """Type of a storage; dtype None if the tensor declares it."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


class Storage(_Inert):
    """Description of a storage; its bytes are read later."""

    __slots__ = ("count", "dtype", "key")

    def __init__(self, dtype: torch.dtype | None, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count


class TensorView(_Inert):
    """Description of a tensor: a storage, and the tensor's place in it. Hooks and attributes are dropped."""

    __slots__ = ("dtype", "offset", "size", "storage", "stride")

    def __init__(
        self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.storage, self.offset, self.size, self.stride, self.dtype = storage, offset, size, stride, dtype


class _Dtype(_Inert):
    """Replaces a ``torch.dtype``."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _NumpyType(_Inert):
    """Replaces a numeric ``numpy.dtype``; its state gives the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *rest: Any) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError("an array's type is described wrongly")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]

    @property
    def dtype(self) -> np.dtype | None:
        """The type; None for objects, dates and records."""
        return np.dtype(f"{self.order}{self.code}") if _NUMPY_CODE.fullmatch(self.code) else None


class Array:
    """Replaces a ``numpy.ndarray``; its state gives the content."""

    __slots__ = ("state",)

    def __init__(self, *args: Any) -> None:
        self.state: tuple | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise pickle.UnpicklingError("an array is described wrongly")
        self.state = state[-4:]

    def array(self) -> np.ndarray | Unsupported:
        """The array, checked."""
        if self.state is None:
            raise pickle.UnpicklingError("an array has no content")
        shape, numpy_type, fortran, content = self.state
        if not isinstance(numpy_type, _NumpyType) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array is described wrongly")
        if numpy_type.dtype is None:
            return Unsupported("an array of objects")
        values = np.frombuffer(_bytes(content), numpy_type.dtype)
        return values.reshape(shape, order="F" if fortran else "C").copy()


def _bytes(content: Any) -> bytes | bytearray:
    """Raw content of an array, which Python 2 wrote as text."""
    if isinstance(content, str):
        return content.encode("latin-1")
    if not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array's content is described wrongly")
    return content


def _scalar(numpy_type: Any, content: Any = b"") -> Any:
    if not isinstance(numpy_type, _NumpyType) or numpy_type.dtype is None:
        return Opaque()
    values = np.frombuffer(_bytes(content), numpy_type.dtype)
    if len(values) != 1:
        raise pickle.UnpicklingError("a number is described wrongly")
    return values[0].item()


def _array_of_buffer(content: Any, numpy_type: Any, shape: Any, order: Any = "C") -> Array:
    array = Array()
    array.__setstate__((shape, numpy_type, order == "F", content))
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are described wrongly")
    return text.encode("latin-1")


def _view(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None) -> TensorView:
    sound = isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
    if not sound or len(size) != len(stride) or not all(type(n) is int for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor is described wrongly")
    if min((offset, *size, *stride)) < 0 or dtype is None:
        raise pickle.UnpicklingError("a tensor has a negative size, or no type")
    return TensorView(storage, offset, size, stride, dtype)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorView:
    return _view(storage, offset, size, stride, getattr(storage, "dtype", None))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorView:
    return _view(storage, offset, size, stride, dtype.dtype if isinstance(dtype, _Dtype) else None)


def _first(value: Any = None, *rest: Any) -> Any:
    return value


def _rebuild_from_type(function: Any, new_type: Any, args: Any, *rest: Any) -> Any:
    if not isinstance(function, _Function) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("a tensor is described wrongly")
    return function(*args)


def _default_dict(*args: Any) -> Mapping:
    return Mapping()


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "set"): lambda items=(): list(items),
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _NumpyType,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_of_buffer),
        )
    },
}
# Types that are named but never called.
_NAMED = frozenset(
    {
        ("builtins", "dict"),
        ("builtins", "list"),
        ("builtins", "int"),
        ("builtins", "float"),
        ("numpy", "ndarray"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch", "per_tensor_affine"),
        ("torch", "per_channel_affine"),
    }
)


def _checked_key(key: Any) -> Any:
    """A key of a dictionary. Hashing nested tuples is recursive, and deep nesting would crash the process."""
    if not isinstance(key, str | int | float | bytes | None):
        raise pickle.UnpicklingError("a dictionary has a key that is neither a name nor a number")
    return key


class _Unpickler(pickle._Unpickler):
    """Unpickler that allows only stand-ins.

    It extends the pure-Python unpickler: its memo is a dictionary, not an array of the length that a file declares as
    in the C version, and it allows checking the keys of dictionaries before they are hashed.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_checked_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        for i in range(0, len(items), 2):
            target[_checked_key(items[i])] = items[i + 1]

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_checked_key(items[i]): items[i + 1] for i in range(0, len(items), 2)})

    def load_items_of_set(self) -> NoReturn:
        raise pickle.UnpicklingError("it contains a set, which does not belong in weights")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_items_of_set
    dispatch[pickle.FROZENSET[0]] = load_items_of_set

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # Python 2's name, which protocol 2 keeps
        known = (module, name)
        if module == "__torch__" or module.startswith("__torch__."):
            # A new class each time: NEWOBJ calls it, and nothing can be attached to a class shared by all modules.
            return type("_ModuleOf", (Module,), {"__slots__": ()})
        if module == "torch" and name in _STORAGE_DTYPES:
            return StorageType(_STORAGE_DTYPES[name])
        if known == ("torch.storage", "UntypedStorage"):
            return StorageType(None)
        if module == "torch" and name in _DTYPES:
            return _Dtype(_DTYPES[name])
        if known in _FUNCTIONS:
            return _Function(_FUNCTIONS[known])
        if known == ("collections", "OrderedDict"):
            return type("_MappingOf", (Mapping,), {"__slots__": ()})
        if known in _OPAQUE:
            return type("_OpaqueOf", (Opaque,), {"__slots__": ()})
        if known in _NAMED:
            return _Function(_refuse_call)
        if module == "torch._utils" and name in _UNSUPPORTED:
            what = _UNSUPPORTED[name]
            return _Function(lambda *args: Unsupported(what))
        if module == "torch.jit._pickle":
            return _Function(_first)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong in weights: it contains code")

    def persistent_load(self, pid: Any) -> Storage:
        # Five entries; files of PyTorch before 1.6 have a sixth, for views of another storage.
        described = isinstance(pid, tuple) and pid[:1] == ("storage",) and len(pid) in (5, 6)
        if not described or not isinstance(pid[1], StorageType) or not isinstance(pid[4], int) or pid[4] < 0:
            raise pickle.UnpicklingError("a storage is described wrongly")
        if len(pid) == 6 and pid[5] is not None:
            raise pickle.UnpicklingError("it shares storages as in PyTorch 0.3: save it with a newer version")
        return Storage(pid[1].dtype, str(pid[2]), pid[4])


def _refuse_call(*args: Any) -> NoReturn:
    raise pickle.UnpicklingError("a type is called")


def unpickle(content: bytes) -> Any:
    """The object of a pickle, made of containers, plain values and the stand-ins of this module.

    Raises:
        pickle.UnpicklingError: the pickle names something else, or has an invalid description.
        ValueError, EOFError: it is damaged.
    """
    _check_opcodes(content)
    return _Unpickler(io.BytesIO(content), encoding="latin-1").load()


def pickle_end(stream: BinaryIO) -> int:
    """End of the pickle that begins at the stream's position."""
    last = collections.deque(pickletools.genops(stream), maxlen=1)
    return last[0][2] + 1


def _check_opcodes(content: bytes) -> None:
    """Raise for a truncated pickle, or one that declares a longer string than itself, which Python would allocate."""
    collections.deque(pickletools.genops(content), maxlen=0)
