"""Class files: the class list of a user's own images, written by hand.

::

    # Street scenes. Everything after a # is a comment.
    road, street, asphalt      a class; names after the first are synonyms, whose text features are averaged
    tree
    person, pedestrian; rider  after a semicolon: another query of the class, again with synonyms
    background: sky, wall      optional, one line: what else may be seen

Each query of a class is a separate class for the model; the class has the maximum of their logits, M_c = max_q M_q.
So has the background, since "sky" and "wall" have little in common as text: in masks its names become one class,
ignored or kept as a class called ``background`` after all others.
"""

from __future__ import annotations

import dataclasses
import html
import os
import re
import unicodedata
from collections.abc import Callable

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, display_path, read_text

BACKGROUND = "background"
IGNORE_LABEL = 255
"""Pixels that belong to no class, in the label files and masks of all data sets."""
# Ids of an index PNG of 8 bits, 255 apart.
MAX_CLASSES = IGNORE_LABEL
MAX_BACKGROUND = MAX_CLASSES
"""Names of the background line; each is a class for the model."""
MAX_NAMES = 4096
"""Names in total, with synonyms: each is encoded with every prompt template."""
MAX_QUERIES = 1024
"""Queries after the first of their classes, in total; each is a class for the model."""
MAX_NAME_LENGTH = 300
"""Characters of a name. CLIP takes 77 tokens, and a tokenizer's time grows with the square of a word's length."""

# Enough for 255 classes with all their synonyms; a larger file is something else.
_MAX_BYTES = MIB

_LINE_END = re.compile(r"\r\n|\r|\n")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_ENTITY = re.compile(r"&(?:amp;)*(?:#\d+|#x[\da-f]+|\w+);", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ClassList:
    """The contents of a class file.

    Attributes:
        classes: for each class its name and any synonyms: its first query.
        background: names of the background line; empty without one.
        path: the file, for messages.
        lines: line numbers, from 1, of each of :attr:`model_classes`.
        queries: further queries: the index of the class, and the query's name and any synonyms.
    """

    classes: tuple[tuple[str, ...], ...]
    background: tuple[str, ...] = ()
    path: str = ""
    lines: tuple[int, ...] = ()
    queries: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def model_classes(self) -> list[list[str]]:
        """The classes that the model distinguishes: those of the file, then each further query and each background
        name as a class."""
        further = [names for _, names in self.queries]
        return [list(names) for names in (*self.classes, *further)] + [[name] for name in self.background]

    @property
    def entries(self) -> list[str]:
        """The classes as lines of a class file: synonyms after commas, further queries after semicolons."""
        queries = [[names] for names in self.classes]
        for index, names in self.queries:
            queries[index].append(names)
        return ["; ".join(", ".join(names) for names in of_class) for of_class in queries]

    def mask_names(self, keep_background: bool) -> list[str]:
        """Names of the ids in masks: the classes' first names and, if it is kept, ``background``."""
        kept = [BACKGROUND] if keep_background and self.background else []
        return [names[0] for names in self.classes] + kept

    def mask_ids(self, keep_background: bool) -> list[int]:
        """Mask id of each of :attr:`model_classes`; :data:`IGNORE_LABEL` for an ignored background."""
        count, of_queries = len(self.classes), [index for index, _ in self.queries]
        return [*range(count), *of_queries, *(count if keep_background else IGNORE_LABEL for _ in self.background)]


def read_class_file(path: str | os.PathLike[str], option: str = "--classes") -> ClassList:
    """Read a class file, UTF-8 with or without a byte order mark, with any line ends.

    Args:
        option: what names the file, for errors.

    Raises:
        ReclipError: the file is missing or not text, a name is empty or occurs twice, there are fewer than two names or
            more than an index mask can hold. The message names the line.
    """
    text = read_text(path, "class file", limit=_MAX_BYTES, remedy=f"check {option}")
    return parse_classes(text, display_path(path))


def parse_classes(text: str, path: str) -> ClassList:
    """Read the text of a class file; see :func:`read_class_file`.

    Args:
        path: for messages.
    """
    classes: list[tuple[str, ...]] = []
    queries: list[tuple[int, tuple[str, ...]]] = []
    background: tuple[str, ...] = ()
    lines: list[int] = []
    background_line = 0
    seen: dict[str, int] = {}
    for number, raw in enumerate(_LINE_END.split(text), start=1):
        line = _COMMENT.sub("", raw).strip()
        if not line:
            continue
        where = f"class file {path}, line {number}"
        key, colon, rest = line.partition(":")
        if colon and key.strip().lower() != BACKGROUND:
            raise ReclipError(f"{where}: unknown key {key.strip()[:40]!r}; only {BACKGROUND}: may begin a line")
        if colon and background_line:
            raise ReclipError(f"{where}: a second {BACKGROUND}: line after line {background_line}: put all into one")
        parts = [rest] if colon else _split_queries(line)
        found = [_names_of(part, number, seen, where) for part in parts]
        if colon:
            background, background_line = found[0], number
            if len(background) > MAX_BACKGROUND:
                raise ReclipError(f"{where}: more than {MAX_BACKGROUND} background names: shorten the list")
            continue
        for names in found if len(found) > 1 else ():
            _check_query(names, where)
        queries += [(len(classes), names) for names in found[1:]]
        if len(queries) > MAX_QUERIES:
            raise ReclipError(f"{where}: more than {MAX_QUERIES:,} queries after semicolons: shorten the list")
        classes.append(found[0])
        lines.append(number)
    all_lines = (*lines, *(lines[index] for index, _ in queries), *(background_line for _ in background))
    result = ClassList(tuple(classes), background, path, all_lines, tuple(queries))
    _check_count(result, seen.get(BACKGROUND))
    return result


def _names_of(part: str, line: int, seen: dict[str, int], where: str) -> tuple[str, ...]:
    """The checked names of a query, or of the background line; notes them in ``seen``."""
    written = part.split(",")
    names = tuple(" ".join(name.split()) for name in written)
    if len(seen) + len(names) > MAX_NAMES:
        raise ReclipError(f"{where}: more than {MAX_NAMES:,} names in all: shorten the list")
    for name, as_written in zip(names, written, strict=True):
        _check_separators(as_written.strip(), where)
        _check_name(name, line, seen, where)
    return names


def _split_queries(line: str) -> list[str]:
    """The queries of a line, between semicolons; that of an HTML entity, as in ``rock &amp; sand``, separates none."""
    entities = [found for found in _ENTITY.finditer(line) if html.unescape(found.group()) != found.group()]
    inside = {k for found in entities for k in range(*found.span())}
    cuts = [k for k, letter in enumerate(line) if letter == ";" and k not in inside]
    starts = [0, *(k + 1 for k in cuts)]
    return [line[start:end] for start, end in zip(starts, [*cuts, len(line)], strict=True)]


def _check_query(names: tuple[str, ...], where: str) -> None:
    """Raise :class:`ReclipError` for a query without a letter: a column of a table, such as ``7;road;128,64,128``."""
    for name in names:
        if not any(letter.isalpha() for letter in name):
            raise ReclipError(
                f"{where}: {name[:40]!r} is not a query: write one class per line, with commas between synonyms and"
                " semicolons between queries; no numbers or colours"
            )


def _check_separators(name: str, where: str) -> None:
    """Raise :class:`ReclipError` for a name with a separator of other formats in it."""
    # Twice, as CLIP's tokenizer does: "rock &amp; sand" has no semicolon.
    for separator, title in (("\t", "a tab"), (";", "a semicolon")):
        if separator in html.unescape(html.unescape(name)):
            raise ReclipError(
                f"{where}: the name {name[:40]!r} contains {title}: write one class per line, with commas between names"
            )


def _check_name(name: str, line: int, seen: dict[str, int], where: str) -> None:
    if not name:
        raise ReclipError(f"{where}: an empty name: remove the comma or semicolon, or write a name")
    if len(name) > MAX_NAME_LENGTH:
        raise ReclipError(
            f"{where}: the name {name[:30]!r}... has {len(name):,} characters, more than {MAX_NAME_LENGTH}: shorten it"
        )
    if not name.isprintable():
        raise ReclipError(f"{where}: the name {name!r} has control characters: retype it")
    if name.casefold() in seen:
        raise ReclipError(f"{where}: {name!r} is also in line {seen[name.casefold()]}: remove one of them")
    seen[name.casefold()] = line


def _check_count(classes: ClassList, named_background: int | None) -> None:
    path = classes.path
    if not classes.classes:
        alone = "; background names alone are not enough" if classes.background else ""
        raise ReclipError(f"class file {path} names no class: write one class per line{alone}")
    if len(classes.classes) + len(classes.background) < 2:
        raise ReclipError(
            f"class file {path} names only one class, which every pixel would get: add others, or a {BACKGROUND}: line"
        )
    if classes.background and named_background is not None:
        raise ReclipError(
            f"class file {path}, line {named_background}: a class cannot be called {BACKGROUND} next to a"
            f" {BACKGROUND}: line: rename it"
        )
    room = MAX_CLASSES - bool(classes.background)
    if len(classes.classes) > room:
        raise ReclipError(
            f"class file {path}, line {classes.lines[room]}: more than {MAX_CLASSES} classes, which index masks"
            " of 8 bits cannot hold: shorten the list"
        )


def check_name_tokens(classes: ClassList, encode: Callable[[str], list[int]], limit: int | None = None) -> None:
    """Check the names as CLIP's text encoder reads them.

    Tokenizers clean names first: composed and decomposed letters, full-width and plain ones, curly and straight quotes,
    ``&amp;`` and ``&`` become the same. If two names have the same tokens, the second can never win.

    Args:
        encode: returns the token ids of a name, without the start and end tokens.
        limit: tokens that the longest prompt template leaves to a name in the context; None for no limit.

    Raises:
        ReclipError: a name has no tokens, the same tokens as another name, or more than ``limit``; the message names
            the lines.
    """
    seen: dict[tuple[int, ...], tuple[str, int]] = {}
    for names, line in zip(classes.model_classes, classes.lines, strict=True):
        for name in names:
            tokens = tuple(encode(name))
            where = f"class file {classes.path}, line {line}"
            if not tokens:
                raise ReclipError(f"{where}: CLIP's tokenizer finds nothing in the name {name!r}: write it in letters")
            if limit is not None and len(tokens) > limit:
                raise ReclipError(
                    f"{where}: the name {name[:30]!r}... has {len(tokens)} tokens, more than the {limit} that CLIP's"
                    " text encoder takes with a prompt: shorten it"
                )
            other, other_line = seen.setdefault(tokens, (name, line))
            if (other, other_line) != (name, line):
                same = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other)
                first, second = map(ascii if same else repr, (other, name))  # otherwise they would look the same
                raise ReclipError(
                    f"{where}: CLIP reads the name {second} like {first} in line {other_line}: a name belongs to one"
                    " class, remove one of them"
                )
