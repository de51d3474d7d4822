"""State dicts: found in a file's content, with plain names, and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.utils.tensor_files.pickled import Unsupported

# Types that weights may have; no layer here computes with others (float8, complex numbers, ...).
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)


def state_dict_of(content: Any, what: str, wrappers: Sequence[str] = ("state_dict", "model")) -> dict[str, Tensor]:
    """State dict in the content of a file, with plain names: without ``module.`` and ``_orig_mod.``.

    NumPy arrays become tensors. Other values (numbers, strings, an epoch counter) are left out.

    Args:
        content: from :func:`~reclip_d2.utils.tensor_files.read_tensor_file`.
        what: what errors call the file: ``"checkpoint a.pth"``.
        wrappers: keys under which the state dict may be nested.

    Raises:
        ReclipError: there is none, it contains an unsupported kind of tensor, or two tensors get the same name.
    """
    for key in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ReclipError(f"{what} contains no state dict: give a file of named tensors")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Unsupported):
            raise ReclipError(f"{what}: {name} is {value.what}: save plain tensors")
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
        if isinstance(value, Tensor):
            plain = plain_name(name)
            if plain in state:
                raise ReclipError(f"{what} contains two tensors for {plain}: save one model")
            state[plain] = value
    return state


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes of ``torch.compile`` (``_orig_mod.``), ``DataParallel`` and averaged models
    (``module.``), in any order."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def check_tensors(content: Any, what: str) -> None:
    """Raise :class:`ReclipError` with the name of any tensor of an unsupported kind or with non-finite values.

    Args:
        content: tensors in containers of any depth.
        what: see :func:`state_dict_of`.
    """
    for name, value in _leaves(content):
        if isinstance(value, Unsupported):
            raise ReclipError(f"{what}: {name} is {value.what}: save plain tensors")
        if not isinstance(value, Tensor):
            continue
        if value.dtype not in _DTYPES:
            raise ReclipError(f"{what}: {name} is of type {str(value.dtype).removeprefix('torch.')}: save it as float")
        if not value.is_floating_point():
            continue
        # The sum needs no memory, and is finite unless a value is not, or float64 overflows.
        if not torch.isfinite(value.sum(dtype=torch.float64)) and not torch.isfinite(value).all():
            raise ReclipError(f"{what}: {name} has values that are not finite (nan, inf): the weights are damaged")


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, Mapping):
            stack.extend((f"{name}.{key}" if name else str(key), value) for key, value in node.items())
        elif isinstance(node, list | tuple):
            stack.extend((f"{name}.{index}" if name else str(index), value) for index, value in enumerate(node))
        else:
            yield name, node


def dtype_mismatches(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor that has integers where the model has floats, or the other way round."""
    return [
        f"{key} is of type {str(value.dtype).removeprefix('torch.')} instead of"
        f" {str(own[key].dtype).removeprefix('torch.')}"
        for key, value in state.items()
        if key in own and value.is_floating_point() != own[key].is_floating_point()
    ]
