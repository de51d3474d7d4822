"""Load a configuration file safely."""

from __future__ import annotations

import ast
import difflib
import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from reclip_d2.config.checks import check_config
from reclip_d2.config.files import find_config_file
from reclip_d2.config.keys import PATH_KEYS, RULES, add_reclip_config
from reclip_d2.config.rules import MAX_TEXT, coerced, problem_of, shown
from reclip_d2.config.yaml_file import MAX_DEPTH, read_yaml
from reclip_d2.errors import ReclipError

BASE_KEY = "_BASE_"
# Files that one config may be made of, with all its bases.
MAX_FILES = 64
# Longest text that is looked at for a list or a number.
_MAX_LITERAL = 1 << 17


def load_config(config_file: str, opts: Sequence[Any] = (), *, bases: bool = True) -> CfgNode:
    """Detectron2's config with the project's keys, a YAML file (``_BASE_`` honoured) and ``KEY VALUE`` overrides.

    YAML is loaded safely: unlike ``CfgNode.merge_from_file`` no Python object is ever constructed, nothing is fetched,
    and size and depth are bounded. Every value is checked against its rule.

    Args:
        config_file: path; "" for the defaults alone. ``configs/...`` that the working folder does not have is the
            package's own.
        opts: keys and values in turn; a value that is a text is read as Python's literal where it is one.
        bases: take a ``_BASE_`` in the file; False for a file of unknown origin, which has no say in what is read.

    Raises:
        ReclipError: missing file, bad YAML, unknown key, a value that its key does not take.
    """
    cfg = get_cfg()
    add_reclip_config(cfg)
    if config_file:
        config_file = find_config_file(config_file)
        source = f"config file {config_file}"
        for key, value in _leaves(_load_tree(Path(config_file), "config file", [], [0], bases), source):
            _set(cfg, key, value, source)
    if opts:
        if len(opts) % 2:
            raise ReclipError(f"overrides are pairs of KEY VALUE; {opts[-1]!r} has no partner")
        for key, value in zip(opts[::2], opts[1::2], strict=True):
            _set(cfg, str(key), value, "")
    _expand_home(cfg)
    check_config(cfg)
    return cfg


def _expand_home(cfg: CfgNode) -> None:
    """Expand ``~`` where a value is a path: what a shell does not do in ``KEY VALUE``, nor anyone in YAML."""
    for key in PATH_KEYS:
        *nodes, name = key.split(".")
        node = functools.reduce(operator.getitem, nodes, cfg)
        if isinstance(node[name], str) and node[name].startswith("~"):
            node[name] = os.path.expanduser(node[name])


# ---- files ------------------------------------------------------------------------------------------------------


def _load_tree(path: Path, what: str, chain: list[str], count: list[int], bases: bool) -> dict[str, Any]:
    """A file over its bases, as nested dicts.

    Args:
        what: what the file is called in messages.
        chain: real paths of the files that this one is a base of, and so on.
        count: files that were read for the config so far.
    """
    count[0] += 1
    if count[0] > MAX_FILES:
        raise ReclipError(f"{what} {path}: more than {MAX_FILES} files are named by _BASE_ in turn")
    tree = read_yaml(path, what)
    if not isinstance(tree, dict) or not tree or not all(isinstance(key, str) for key in tree):
        raise ReclipError(f"{what} {path} holds no keys: expected KEY: value lines")
    if BASE_KEY not in tree:
        return tree
    if not bases:
        raise ReclipError(f"{what} {path} names a {BASE_KEY}, which a model's own config has no use for")
    own = tree.pop(BASE_KEY)
    names = own if isinstance(own, list) else [own]
    real = os.path.realpath(path)
    merged: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > MAX_TEXT:
            raise ReclipError(f"{what} {path}: its {BASE_KEY} is {shown(name)}; name a file, or a list of files")
        if "://" in name:
            raise ReclipError(f"{what} {path}: its {BASE_KEY} {shown(name)} is an address: copy the file and name that")
        base = path.parent / Path(name).expanduser()
        if os.path.realpath(base) in (*chain, real):
            raise ReclipError(f"{what} {path}: its {BASE_KEY} files name each other in a circle")
        _merge(_load_tree(base, f"config file {path}: its {BASE_KEY}", [*chain, real], count, bases), merged)
    _merge(tree, merged)
    return merged


def _merge(tree: Mapping[str, Any], into: dict[str, Any]) -> None:
    """Put the values of nested dicts over those of others."""
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(value, into[key])
        else:
            into[key] = value


def _leaves(tree: Mapping[str, Any], source: str, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Full keys and values of nested dicts; an empty dict is a value."""
    for key, value in tree.items():
        if not isinstance(key, str) or depth > MAX_DEPTH:
            raise ReclipError(f"{source}: {prefix}{shown(key)} is no key")
        if isinstance(value, dict) and value:
            yield from _leaves(value, source, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


# ---- values -----------------------------------------------------------------------------------------------------


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:  # noqa: ANN401
    """Set a key to a value that its rule takes; errors begin with ``source`` unless that is ""."""
    *nodes, leaf = key.split(".")
    node: Any = cfg
    for part in (*nodes, leaf):
        if not isinstance(node, CfgNode) or part not in node:
            raise ReclipError(f"{source or 'command line'}: there is no key {shown_key(key)}{_nearest(cfg, key)}")
        parent, node = node, node[part]
    before = f"{source}: " if source else ""
    if isinstance(node, CfgNode):
        if isinstance(value, dict) and not value:  # a node without keys changes nothing
            return
        raise ReclipError(
            f"{source or 'command line'}: {key} is {shown(value)}; it has keys of its own: {', '.join(list(node)[:6])}"
        )
    rule = RULES.get(key)
    value = coerced(decode(value), node)
    if rule is not None:
        problem = problem_of(rule, value)
    else:  # a key of Detectron2's that nothing here reads
        same = value is None or node is None or type(value) is type(node)
        problem = None if same else f"is {shown(value)}; its default is {shown(node)}, of another type"
    if problem:
        raise ReclipError(f"{before}{key} {problem}")
    parent[leaf] = value


def decode(value: Any) -> Any:  # noqa: ANN401
    """A text as the number, list, boolean or None that it is the Python literal of; anything else as it is."""
    if not isinstance(value, str) or len(value) > _MAX_LITERAL:
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def shown_key(key: str) -> str:
    """A key for a message: as it is, or quoted where it is no word."""
    return key if key and key.isprintable() and len(key) <= 80 else shown(key)


def _nearest(cfg: CfgNode, key: str) -> str:
    """What the user may have meant, for the end of a message."""
    names = list(_names(cfg))
    wanted = key.upper()[:200]
    ends = [name for name in names if name.endswith(f".{wanted}")]
    own = [name for name in ends if name in RULES]
    close = (own or ends or difflib.get_close_matches(wanted, names, n=1, cutoff=0.6))[:1]
    where = "see reclip_d2/config/keys.py for the keys"
    return f"; did you mean {close[0]}? ({where})" if close else f" ({where})"


def _names(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _names(value, f"{prefix}{key}.")
