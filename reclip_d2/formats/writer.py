"""The base class of all writers."""

from __future__ import annotations

import abc
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TextIO

from PIL import Image

from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.prediction import Prediction, Stems
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.pages import split_page


class Writer(abc.ABC):
    """Writes predictions in one format into one folder.

    ``add`` each image, in any order, then ``finish``. Files are written atomically. The same predictions give the same
    bytes, independent of the order and the number of runs (with the same versions of Pillow and zlib).

    Attributes:
        whole_set: whether one file contains all images, so that every image must be added in the run that finishes.
        needs_image: whether ``add`` needs the picture.
        needs_scores: whether ``add`` needs scores, which index masks lack: :func:`write_formats` cannot make the
            format.
    """

    whole_set: ClassVar[bool] = False
    needs_image: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        """
        Args:
            output: folder of this format; created if necessary.
                classes: classes of the label maps.

            Raises:
                ReclipError: the format cannot represent a class name.
        """
        self.check_classes(classes)
        self.output = Path(output)
        self.classes = classes
        self._stems = Stems()

    @classmethod  # noqa: B027 (most formats allow any name)
    def check_classes(cls, classes: MaskClasses) -> None:
        """Raise :class:`ReclipError` if the format cannot represent a class name."""

    @classmethod  # noqa: B027
    def check_path(cls, path: PurePosixPath) -> None:
        """Raise :class:`ReclipError` if the format, unlike others, cannot represent an image's name."""

    @classmethod
    def is_per_image(cls) -> bool:
        """Whether every file belongs to one image, so that several processes can write the format at once."""
        return not cls.whole_set and cls.finish is Writer.finish

    def files(self, path: PurePosixPath) -> list[Path]:
        """Files that ``add`` writes only for the image ``path``."""
        return []

    def is_done(self, path: PurePosixPath, since: int = 0) -> bool:
        """Whether an image's files exist, so that ``add`` can be skipped.

        Args:
            since: the files must also have been written at this time or later (ns since the epoch).
        """
        if self.whole_set:
            return False
        try:
            return all(os.stat(file).st_mtime_ns >= since for file in self.files(path))
        except FileNotFoundError:
            return False

    def add(self, prediction: Prediction) -> None:
        """Write one image's prediction, or record it for ``finish``.

        Raises:
            ReclipError: another image has the same path except for the extension, the format cannot represent the
                    image's name, or an id is not a class.
                ValueError: the picture or the scores that the format needs are missing.
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

    def finish(self) -> None:  # noqa: B027 (formats with one file per image have nothing to finish)
        """Write the files that contain all images."""

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
    """Place an image where a format expects it.

    Args:
        source: the image.
        target: its place.
        mode: ``link`` (a symbolic link to its absolute path), ``copy``, or ``none``, which does nothing. A page of a
            TIFF is written as it is read, in 8-bit RGB.
    """
    if mode == "none":
        return
    if split_page(source)[1]:
        with atomic_write(target) as temporary:
            Image.fromarray(read_image(source)).save(temporary)
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
    """Byte records by key, in an unnamed temporary file: memory holds only the keys, and a kill leaves no file behind.

    The file is in the output folder, not in ``/tmp``, which may be too small.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places: dict[str, tuple[int, int]] = {}

    def put(self, key: str, data: bytes) -> None:
        """Add a record, replacing one with the same key."""
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
        """Add a JSON-serialisable record."""
        self.put(key, json.dumps(record).encode("ascii"))

    def records(self) -> Iterator[tuple[str, Any]]:
        """All records, sorted by key."""
        for key, data in self.items():
            yield key, json.loads(data)


class RecordsWriter(Writer):
    """A writer of one file with a JSON record per image: ``_add`` spools records, ``finish`` writes them sorted."""

    whole_set: ClassVar[bool] = True

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        super().__init__(output, classes)
        self._records = JsonSpool(self.output)

    def close(self) -> None:
        """Free the spool."""
        self._records.close()


def write_json_arrays(stream: TextIO, head: Mapping[str, Any], arrays: Mapping[str, Iterable[Any]]) -> None:
    """Write one JSON object: the members of ``head``, then ``arrays``, one record per line, streamed."""
    stream.write("{\n")
    for key, value in head.items():
        stream.write(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n")
    for number, (key, records) in enumerate(arrays.items()):
        stream.write(f"{',' if number else ''}{json.dumps(key)}: ")
        write_json_array(stream, (json.dumps(record, ensure_ascii=False) for record in records))
    stream.write("}\n")


def write_json_array(stream: TextIO, records: Iterable[str]) -> None:
    """Write a JSON array of records given as JSON texts, one per line."""
    separator = "[\n"
    for record in records:
        stream.write(separator + record)
        separator = ",\n"
    stream.write("[]\n" if separator == "[\n" else "\n]\n")
