"""Records that are written one an image and read back, sorted, when the set is complete."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO


class Spool:
    """Byte records by key, in an unnamed temporary file: memory holds the keys alone, and a kill leaves no file behind.

    The folder, not ``/tmp``, holds the file: it has room for the outputs.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places: dict[str, tuple[int, int]] = {}

    def put(self, key: str, data: bytes) -> None:
        """Keep a record; a key that comes again replaces its record."""
        self._places[key] = (self._file.seek(0, 2), len(data))
        self._file.write(data)

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(self._places)

    def items(self) -> Iterator[tuple[str, bytes]]:
        """All records, sorted by key."""
        for key in self.keys():
            offset, size = self._places[key]
            self._file.seek(offset)
            yield key, self._file.read(size)

    def close(self) -> None:
        """Free the file."""
        self._file.close()


class JsonSpool(Spool):
    """A :class:`Spool` of JSON records."""

    def put_record(self, key: str, record: Any) -> None:
        """Keep a record that JSON can write."""
        self.put(key, json.dumps(record).encode("ascii"))

    def records(self) -> Iterator[tuple[str, Any]]:
        """All records, sorted by key."""
        for key, data in self.items():
            yield key, json.loads(data)


def write_json_arrays(stream: TextIO, head: Mapping[str, Any], arrays: Mapping[str, Iterable[Any]]) -> None:
    """Write one JSON object: the members of ``head``, then ``arrays``, a record a line, none of which is held whole."""
    stream.write("{\n")
    for key, value in head.items():
        stream.write(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n")
    for number, (key, records) in enumerate(arrays.items()):
        stream.write(f"{',' if number else ''}{json.dumps(key)}: ")
        write_json_array(stream, (json.dumps(record, ensure_ascii=False) for record in records))
    stream.write("}\n")


def write_json_array(stream: TextIO, records: Iterable[str]) -> None:
    """Write a JSON array of records that are JSON texts, one a line."""
    separator = "[\n"
    for record in records:
        stream.write(separator + record)
        separator = ",\n"
    stream.write("[]\n" if separator == "[\n" else "\n]\n")
