"""Writing tensors such that a full disk raises the operating system's error, not torch's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor


class _Stream:
    """A file that remembers why writing failed: torch's archive writer raises another error, or aborts the process if
    it writes to a path."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_archive(content: object, path: str | os.PathLike[str]) -> None:
    """``torch.save``.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as file:
        stream = _Stream(file)
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            raise (stream.error or error) from error


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """``safetensors.torch.save_file``.

    Args:
        metadata: text entries of the header.

    Raises:
        OSError: the file cannot be written.
    """
    data: Any = safetensors.torch.save(dict(tensors), None if metadata is None else dict(metadata))
    with open(path, "wb") as file:
        file.write(data)
