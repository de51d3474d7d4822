"""Read the tensors of a file in any supported format."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import zipfile
from typing import Any

from reclip_d2.errors import ReclipError, is_user_error
from reclip_d2.utils.files import StrPath, open_regular
from reclip_d2.utils.tensor_files.archives import DamagedError, read_archive, read_legacy, read_pickle
from reclip_d2.utils.tensor_files.safetensors_file import read_safetensors
from reclip_d2.utils.text import shorten

_HEAD = 512
# Users name Git LFS pointers, web pages and archives by mistake.
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = re.compile(rb"\s*(<!doctype html|<html|<head|<body|<!--)", re.IGNORECASE)
_OTHER = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"(\xb5/\xfd", "a Zstandard archive: unpack it"),
    (b"\x89HDF", "an HDF5 file: convert it to PyTorch's format"),
    (b"GGUF", "a GGUF file: convert it to PyTorch's format"),
    (b"\x93NUMPY", "a NumPy array: save the weights with torch.save or safetensors"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
)

SAFETENSORS, ARCHIVE, LEGACY, PICKLE = "safetensors", "archive", "legacy", "pickle"
# The magic number in the first pickle of PyTorch's old format, and its encodings.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The content of a weight file.

    Attributes:
        content: the saved object: tensors and NumPy arrays in plain containers.
        metadata: text entries of a safetensors header; empty for other formats.
        is_torchscript: whether it is a TorchScript archive.
    """

    content: Any
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    is_torchscript: bool = False


def read_tensor_file(path: StrPath, what: str, shown: str | None = None) -> TensorFile:
    """Content of a weight file: safetensors, ``torch.save``'s (new or old), TorchScript, or pickled NumPy arrays.

    The format is detected from the content, not the name. Nothing in the file is executed; checksums are verified, and
    the unpacked size is compared with the file's size before reading.

    Args:
        what: what errors call the file: ``"checkpoint"``, ``"MODEL.CLIP.PRETRAINED"``.
        shown: the file's name in errors, if not the path.

    Raises:
        MissingFileError: the file does not exist.
        ReclipError: it is not a regular file, not a weight file, damaged, or contains code.
    """
    name = f"{what} {shown or os.fspath(path)}"
    try:
        with open_regular(path, what) as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEAD)
            stream.seek(0)
            kind = _kind_of(head)
            if kind is None:
                raise ReclipError(f"{name} cannot be read as tensors: it is {_describe(head)}")
            if kind == SAFETENSORS:
                return TensorFile(*read_safetensors(path, stream, size))
            if kind == ARCHIVE:
                content, torchscript = read_archive(stream, size)
                return TensorFile(content, is_torchscript=torchscript)
            return TensorFile((read_legacy if kind == LEGACY else read_pickle)(stream, size))
    except DamagedError as error:
        raise ReclipError(f"{name} cannot be read as tensors: it {error}") from error
    except zipfile.BadZipFile as error:
        raise ReclipError(
            f"{name} cannot be read as tensors: it is truncated or damaged, copy or download it again"
        ) from error
    except pickle.UnpicklingError as error:
        raise ReclipError(f"{name} cannot be read as tensors: {error}") from error
    except Exception as error:  # reading a damaged archive or pickle may raise nearly anything
        if is_user_error(error):  # including out of memory
            raise
        raise ReclipError(
            f"{name} cannot be read as tensors ({type(error).__name__}): it is damaged, copy or download it again"
        ) from error


def _kind_of(head: bytes) -> str | None:
    """The format of a weight file, from its first bytes (at least 64, if it has as many); None if it is not one."""
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return ARCHIVE
    if head[8:9] == b"{" and not _is_text(head):
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return LEGACY if head[2:].startswith(_LEGACY_MAGIC) else PICKLE
    return None


def _describe(head: bytes) -> str:
    """Describe a file that is not a weight file, to follow "it is"; with the remedy if there is one."""
    if not head:
        return "empty: copy or download it again"
    if head.startswith(_GIT_LFS):
        return "a Git LFS pointer in place of the file: fetch the file itself with git lfs pull"
    if _MARKUP.match(head):
        return "a web page (HTML): download the file itself, not the page that shows it"
    if len(head.strip(b"\0")) == 0:
        return "full of zeros: a copy or download was interrupted, repeat it"
    for start, what in _OTHER:
        if head.startswith(start):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if _is_text(head):
        return f"a text file that begins with {_first_line(head)!r}"
    return "damaged, or a file of another program"


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "ignore")
    return bool(text) and "\0" not in text and all(c.isprintable() or c in "\r\n\t" for c in text)


def _first_line(head: bytes) -> str:
    return shorten(head.decode("utf-8", "ignore").strip().splitlines()[0], 40)
