"""What a file is that should hold weights: people name pointers, web pages and archives by mistake."""

from __future__ import annotations

import re

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
# What the first pickle of PyTorch's old format holds, and the ways to write it.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def kind_of(head: bytes) -> str | None:
    """The format of a weight file by its first bytes (at least 64, if it has so many); None if it is none."""
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return ARCHIVE
    if head[8:9] == b"{" and not _is_text(head):
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return LEGACY if head[2:].startswith(_LEGACY_MAGIC) else PICKLE
    return None


def describe(head: bytes) -> str:
    """What a file is that is no weight file, to follow "it is"; with the remedy where there is one."""
    if not head:
        return "empty: copy or download it again"
    if head.startswith(_GIT_LFS):
        return "a Git LFS pointer, which stands for the file: fetch the file itself with git lfs pull"
    if _MARKUP.match(head):
        return "a web page (HTML): download the file itself, not the page that shows it"
    if len(head.strip(b"\0")) == 0:
        return "full of zeros: a copy or download was broken off, make it again"
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
    line = head.decode("utf-8", "ignore").strip().splitlines()[0]
    return line if len(line) <= 40 else f"{line[:37]}..."
