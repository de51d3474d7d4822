"""What all writers share."""

from __future__ import annotations

import abc
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TextIO

from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.prediction import Prediction, Stems
from reclip_d2.utils.io import atomic_write


class Writer(abc.ABC):
    """Writes predictions in one format into one folder.

    ``add`` each image, in any order, then ``finish``. Files appear whole or not at all. The same predictions give the
    same bytes, whatever the order and the number of runs (with the same versions of Pillow and zlib).

    Attributes:
        whole_set: a file of the format holds all images: every one must be added in the run that finishes.
        needs_image: ``add`` wants the picture.
        needs_scores: ``add`` wants the scores, which no index mask holds: :func:`write_formats` cannot make the format.
    """

    whole_set: ClassVar[bool] = False
    needs_image: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        """
        Args:
            output: folder of this format; made if need be.
            classes: of the label maps.

        Raises:
            ReclipError: the format cannot hold a class name.
        """
        self.check_classes(classes)
        self.output = Path(output)
        self.classes = classes
        self._stems = Stems()

    @classmethod  # noqa: B027 (most formats hold any name)
    def check_classes(cls, classes: MaskClasses) -> None:
        """Raise :class:`ReclipError` if the format cannot hold a class name."""

    @classmethod  # noqa: B027
    def check_path(cls, path: PurePosixPath) -> None:
        """Raise :class:`ReclipError` if the format cannot hold an image's name that others can."""

    def files(self, path: PurePosixPath) -> list[Path]:
        """Files that ``add`` writes for the image ``path`` and no other image."""
        return []

    def is_done(self, path: PurePosixPath, since: int = 0) -> bool:
        """Whether ``add`` has nothing to do for an image: its files exist.

        Args:
            since: and were last written at this time or later (ns since the epoch).
        """
        if self.whole_set:
            return False
        try:
            return all(os.stat(file).st_mtime_ns >= since for file in self.files(path))
        except FileNotFoundError:
            return False

    def add(self, prediction: Prediction) -> None:
        """Write one image's prediction, or note it for ``finish``.

        Raises:
            ReclipError: another image has the same path but for the extension, the format cannot hold the image's
                name, or an id is no class.
            ValueError: the picture or the scores are missing that the format needs.
        """
        for needed, given in ((self.needs_image, prediction.image), (self.needs_scores, prediction.scores)):
            if needed and given is None:
                raise ValueError(f"{type(self).__name__} needs image or scores of {prediction.path}")
        self.check_path(prediction.path)
        self._stems.claim(prediction.path)
        labels = self.classes.checked(prediction.labels, str(prediction.path))
        if labels is not prediction.labels:
            prediction = Prediction(prediction.path, labels, prediction.image, prediction.scores, prediction.source)
        self._add(prediction)

    @abc.abstractmethod
    def _add(self, prediction: Prediction) -> None:
        """:meth:`add` after the checks; the labels have the classes' dtype."""

    def finish(self) -> None:  # noqa: B027 (formats of a file an image have nothing to finish)
        """Write what holds all images."""

    def close(self) -> None:  # noqa: B027
        """Free temporary files. Called by ``with``, with or without an error."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_placing(name: str, mode: str) -> None:
    """Raise :class:`ReclipError` unless ``mode`` is one of :func:`place_image`; ``name`` is the format's."""
    if mode not in ("link", "copy", "none"):
        raise ReclipError(f"{name}'s images is {mode!r}: choose link, copy or none")


def place_image(source: Path, target: Path, mode: str) -> None:
    """Put an image where a format wants it.

    Args:
        source: the image.
        target: its place.
        mode: ``link`` (a symbolic link to its absolute path), ``copy``, or ``none``, which does nothing.
    """
    if mode == "none":
        return
    if mode == "copy":
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
        return
    absolute = os.path.abspath(source)
    if target.is_symlink() and os.readlink(target) == absolute:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".link.", suffix=".tmp") as folder:
        link = Path(folder) / target.name
        link.symlink_to(absolute)
        os.replace(link, target)


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


class RecordsWriter(Writer):
    """A writer whose one file has a JSON record of each image: ``_add`` puts it in, ``finish`` writes them sorted."""

    whole_set: ClassVar[bool] = True

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        super().__init__(output, classes)
        self._records = JsonSpool(self.output)

    def close(self) -> None:
        """Free the spool."""
        self._records.close()


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
