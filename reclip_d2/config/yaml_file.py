"""Read YAML of unknown origin: plain data alone, of bounded size, depth and expansion.

PyYAML's ``safe_load`` runs nothing, but a file below one kilobyte can name itself over and over (aliases) until memory
is full. Here a file is looked at as a graph before anything is built from it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, display_path, read_text

MAX_BYTES = 512 * 1024
MAX_DEPTH = 40
# Values after every alias is written out.
MAX_VALUES = 100_000
# Characters of a whole number; more are no number that a key takes.
MAX_DIGITS = 40

_PREFIX = "tag:yaml.org,2002:"
_PLAIN = {f"{_PREFIX}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_WORDS = {
    "timestamp": "a date: put it in quotes",
    "set": "a set: write a list",
    "binary": "binary data",
    "omap": "an ordered map: write KEY: value lines",
    "pairs": "a list of pairs: write KEY: value lines",
    "value": "a lone '=': put it in quotes",
}


class _Refused(yaml.YAMLError):
    """What is wrong, and where."""

    def __init__(self, message: str, node: Node | None = None) -> None:
        super().__init__(message if node is None else f"line {node.start_mark.line + 1}: {message}")


class _Loader(yaml.SafeLoader):
    """``SafeLoader`` that ends at :data:`MAX_DEPTH`, before Python's stack does."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:  # noqa: ANN401
        self.depth += 1
        try:
            if self.depth > MAX_DEPTH:
                raise _Refused(f"it is nested deeper than {MAX_DEPTH} levels")
            return Composer.compose_node(self, parent, index)
        finally:
            self.depth -= 1


def read_yaml(path: StrPath, what: str) -> Any:  # noqa: ANN401
    """The content of a YAML file: dicts, lists, texts, numbers, booleans and None.

    Args:
        what: what the file is called in messages, such as "config file".

    Raises:
        ReclipError: it cannot be read, is no plain YAML, or is larger, deeper or more entangled than any config.
    """
    text = read_text(path, what, limit=MAX_BYTES, remedy="see configs/")
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ReclipError(f"{what} {display_path(path)} is no plain YAML: {one_line(error)}") from error


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """Plain data from a text; see :func:`read_yaml`.

    Raises:
        yaml.YAMLError: what is wrong.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {}, 0)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(node: Node, sizes: dict[int, int | None], depth: int) -> int:
    """Values that a node holds when all aliases are written out; raise for one that is refused.

    Args:
        sizes: of the nodes that are done; None for those that are being looked at.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _Refused("an alias that names what it stands in", node)
        return size
    if depth > MAX_DEPTH:
        raise _Refused(f"it is nested deeper than {MAX_DEPTH} levels", node)
    sizes[id(node)] = None
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix(_PREFIX)
        raise _Refused(_WORDS.get(kind, f"the tag {ascii(node.tag)[:80]}") + " (plain values are taken alone)", node)
    size = 1
    if isinstance(node, SequenceNode):
        children = node.value
    elif isinstance(node, MappingNode):
        children = [part for pair in node.value for part in pair]
        _check_keys(node)
    else:
        children = []
        _check_scalar(node)
    for child in children:
        size += _check(child, sizes, depth + 1)
        if size > MAX_VALUES:
            raise _Refused(f"it holds more than {MAX_VALUES:,} values once its aliases are written out", node)
    sizes[id(node)] = size
    return size


def _check_keys(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _Refused("a key that is no word", key)
        if key.value in seen:
            raise _Refused(f"the key {ascii(key.value)[:80]} is there twice", key)
        seen.add(key.value)


def _check_scalar(node: ScalarNode) -> None:
    if node.tag == f"{_PREFIX}int" and len(node.value) > MAX_DIGITS:
        raise _Refused(f"a number of more than {MAX_DIGITS} digits", node)
    if node.tag == f"{_PREFIX}float" and (len(node.value) > 10 * MAX_DIGITS or ":" in node.value):
        raise _Refused("a number that no key takes", node)


def one_line(error: object) -> str:
    """The error's message; of a long one the beginning and the end, where the key is named."""
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", " ".join(str(error).split())).strip("'\"")
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-120:]}"
