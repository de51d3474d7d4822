"""Arguments of the Python API: their checks, and errors in their words.

The library's and the command line's messages name options (``--keep-background``) and a class file. Here they name the
arguments of :class:`~reclip_d2.workspace.segmenter.Segmenter`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from reclip_d2.data.class_file import ClassList, parse_classes, read_class_file
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.progress import report_to
from reclip_d2.workspace.options import in_options

Classes = StrPath | ClassList | Sequence[str | Sequence[str]]
"""A class file, or a list with the name of each class, with synonyms after commas or as a list of names."""

_CLASSES = "classes"  # placeholder for the class file's path in messages
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _in_arguments(message: str) -> str:
    """A message of the library or the command line, with this class's arguments in place of options."""
    message = in_options(message).replace(f"class file {_CLASSES}", "classes").replace("IMAGES", "images")
    message = message.replace("give --overwrite", "give overwrite=True").replace("--model", "folder")
    return re.sub(r"(?<!\S)--([a-z][a-z-]+)", lambda option: option[1].replace("-", "_"), message)


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """In the block, errors name arguments, and progress without a listener is discarded."""
    try:
        with report_to(None):
            yield
    except ReclipError as error:
        raise type(error)(_in_arguments(str(error))) from error


def public(method: _Method) -> _Method:
    """Decorator of public methods: errors name arguments, and progress without a listener is discarded."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _own_words():
            return method(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def class_list(classes: Classes, background: Sequence[str]) -> ClassList:
    """The class list of the arguments, checked like a class file with one entry per line.

    Raises:
        ReclipError: it is none, a name is not usable, or both name a background.
    """
    if isinstance(classes, ClassList):
        return classes
    if isinstance(classes, str) and not os.path.exists(os.path.expanduser(classes)):
        raise ReclipError(
            f"classes is the name of a class file, and {classes!r} does not exist: give names as a list,"
            ' ["sky", "road, street"]'
        )
    if isinstance(classes, str | os.PathLike):
        found = read_class_file(classes)
        if not background:
            return found
        if found.background:
            raise ReclipError(f"class file {os.fspath(classes)} has a background: line: omit background")
        classes = found.entries
    if not isinstance(classes, Sequence) or not all(map(_is_entry, classes)):
        raise ReclipError('classes: give a class file, or a list of names such as ["sky", "road, street"]')
    if not classes:
        raise ReclipError('classes is empty: give a list of names such as ["sky", "road, street"]')
    entries = [entry if isinstance(entry, str) else ", ".join(entry) for entry in classes]
    names = [background] if isinstance(background, str) else list(background)
    for entry in (*entries, *names):
        if not entry.strip() or len(entry.splitlines()) > 1 or "#" in entry:
            raise ReclipError(f"classes: {entry!r} is not a name: give a class's name, and synonyms after commas")
    lines = [*entries, *([f"background: {', '.join(names)}"] if names else [])]
    return parse_classes("\n".join(lines), _CLASSES)


def _is_entry(entry: object) -> bool:
    """Whether an entry is a class name, or the names of a class."""
    if isinstance(entry, str):
        return True
    return isinstance(entry, Sequence) and len(entry) > 0 and all(isinstance(name, str) for name in entry)


def check_arguments(images: object, progress: object, **numbers: object) -> None:
    """Check the types of :meth:`Segmenter.fit`'s arguments.

    Raises:
        ReclipError: an argument is of another type.
    """
    if not isinstance(images, str | os.PathLike | Sequence):
        raise ReclipError(f"images is of type {type(images).__name__}: give a folder, an image, or a list of these")
    if progress is not None and not callable(progress):
        raise ReclipError(f"progress {progress!r} is not callable: give a function such as print, or None")
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ReclipError(f"{name} {value!r} is not a whole number")


def with_lines(classes: ClassList) -> ClassList:
    """A class list with line numbers for messages; one from a model's folder has none."""
    if classes.lines:
        return classes
    lines = range(1, len(classes.classes) + 1)
    of_queries = (index + 1 for index, _ in classes.queries)
    background = (len(lines) + 1 for _ in classes.background)
    return dataclasses.replace(classes, path=_CLASSES, lines=(*lines, *of_queries, *background))
