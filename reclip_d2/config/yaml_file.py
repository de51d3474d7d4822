"""Read untrusted YAML: plain data only, of bounded size, depth and expansion.

PyYAML's ``safe_load`` executes nothing, but aliases in a file of less than a kilobyte can expand until memory is full.
Therefore, the graph of nodes is checked before anything is built from it.
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
# Maximum number of values with all aliases expanded.
MAX_VALUES = 100_000
# Maximum length of a whole number; no key takes longer ones.
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
    """What is wrong and in which line."""

    def __init__(self, message: str, node: Node | None = None) -> None:
        super().__init__(message if node is None else f"line {node.start_mark.line + 1}: {message}")


class _Loader(yaml.SafeLoader):
    """``SafeLoader`` that stops at :data:`MAX_DEPTH`, before Python's stack overflows."""

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
        what: name of the file in messages, such as "config file".

    Raises:
        ReclipError: the file cannot be read, is not plain YAML, or exceeds the limits of this module.
    """
    text = read_text(path, what, limit=MAX_BYTES, remedy="see configs/")
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ReclipError(f"{what} {display_path(path)} is not plain YAML: {one_line(error)}") from error


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """Parse plain data; see :func:`read_yaml`.

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
    """Number of values of a node with all aliases expanded; raises if it is not allowed.

    Args:
        sizes: results for finished nodes; None for nodes in progress.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _Refused("an alias that contains itself", node)
        return size
    if depth > MAX_DEPTH:
        raise _Refused(f"it is nested deeper than {MAX_DEPTH} levels", node)
    sizes[id(node)] = None
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix(_PREFIX)
        raise _Refused(_WORDS.get(kind, f"the tag {ascii(node.tag)[:80]}") + " (only plain values are allowed)", node)
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
            raise _Refused(f"it has more than {MAX_VALUES:,} values with its aliases expanded", node)
    sizes[id(node)] = size
    return size


def _check_keys(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _Refused("a key that is not a text", key)
        if key.value in seen:
            raise _Refused(f"the key {ascii(key.value)[:80]} occurs twice", key)
        seen.add(key.value)


def _check_scalar(node: ScalarNode) -> None:
    if node.tag == f"{_PREFIX}int" and len(node.value) > MAX_DIGITS:
        raise _Refused(f"a number of more than {MAX_DIGITS} digits", node)
    if node.tag == f"{_PREFIX}float" and (len(node.value) > 10 * MAX_DIGITS or ":" in node.value):
        raise _Refused("a number that no key accepts", node)


def one_line(error: object) -> str:
    """The error's message in one line; of a long one only the beginning and the end, which names the key."""
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", " ".join(str(error).split())).strip("'\"")
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-120:]}"
