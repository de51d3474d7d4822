"""Load a config from files and overrides, safely."""

from __future__ import annotations

import ast
import difflib
import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg

from reclip_d2.config.checks import check_config
from reclip_d2.config.files import DATASET_KEY, PLACEHOLDER, ConfigFiles
from reclip_d2.config.keys import PATH_KEYS, RULES, add_reclip_config
from reclip_d2.config.rules import coerced, problem_of, shown
from reclip_d2.errors import ReclipError

# Longest text that is parsed as a list or a number.
_MAX_LITERAL = 1 << 17


def load_config(config_files: str | Sequence[str] = (), opts: Sequence[Any] = (), *, bases: bool = True) -> CfgNode:
    """Load Detectron2's config with the project's keys, YAML files and ``KEY VALUE`` overrides; later ones win.

    YAML is loaded safely: unlike ``CfgNode.merge_from_file``, this constructs no Python objects, fetches nothing, and
    limits size and depth. Each value is checked by its key's rule.

    Args:
        config_files: one or several paths; none, or "", for the defaults. See :mod:`reclip_d2.config.files` for how
            files are found and merged.
        opts: alternating keys and values; texts that are Python literals are parsed.
        bases: see :class:`~reclip_d2.config.files.ConfigFiles`.

    Raises:
        ReclipError: missing file, invalid YAML, unknown key, or invalid value.
    """
    cfg = get_cfg()
    add_reclip_config(cfg)
    names = [config_files] if isinstance(config_files, str) else config_files
    files = ConfigFiles([name for name in names if name], bases=bases)
    for key, (value, source) in files.values.items():
        _set(cfg, key, value, source)
    for key in map(str, opts[::2]):
        if key.startswith("-"):
            raise ReclipError(f"{key} comes after KEY VALUE pairs: put all options before the first pair")
    if len(opts) % 2:
        raise ReclipError(f"overrides are KEY VALUE pairs; {opts[-1]!r} has no value")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        _set(cfg, str(key), value, "")
    _check_data_set(files, opts[::2])
    _expand_home(cfg)
    check_config(cfg)
    return cfg


def _check_data_set(files: ConfigFiles, overridden: Sequence[Any]) -> None:
    """Raise :class:`ReclipError` for values with ``{_DATASET_}`` if no file defines it."""
    for key, (value, source) in files.values.items():
        if isinstance(value, str) and PLACEHOLDER in value and not files.dataset and key not in overridden:
            raise ReclipError(
                f"{source}: {key} is {value}, but no file defines {DATASET_KEY}: give a data set's file first, such as"
                f" --config-file configs/datasets/embedded.yaml, or set {key}"
            )


def _expand_home(cfg: CfgNode) -> None:
    """Expand ``~`` in paths, which shells do neither in ``KEY VALUE`` overrides nor in YAML."""
    for key in PATH_KEYS:
        *nodes, name = key.split(".")
        node = functools.reduce(operator.getitem, nodes, cfg)
        if isinstance(node[name], str) and node[name].startswith("~"):
            node[name] = os.path.expanduser(node[name])


# ---- values -----------------------------------------------------------------------------------------------------


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:  # noqa: ANN401
    """Check a value and set its key; errors start with ``source`` unless that is ""."""
    *nodes, leaf = key.split(".")
    node: Any = cfg
    for part in (*nodes, leaf):
        if not isinstance(node, CfgNode) or part not in node:
            raise ReclipError(f"{source or 'command line'}: there is no key {shown_key(key)}{_nearest(cfg, key)}")
        parent, node = node, node[part]
    before = f"{source}: " if source else ""
    if isinstance(node, CfgNode):
        if isinstance(value, dict) and not value:  # an empty node changes nothing
            return
        raise ReclipError(
            f"{source or 'command line'}: {key} is {shown(value)}; it has keys below it: {', '.join(list(node)[:6])}"
        )
    rule = RULES.get(key)
    value = coerced(decode(value), node)
    if rule is not None:
        problem = problem_of(rule, value)
    else:  # a key of Detectron2's that the package does not read
        same = value is None or node is None or type(value) is type(node)
        problem = None if same else f"is {shown(value)}; its default is {shown(node)}, of another type"
    if problem:
        raise ReclipError(f"{before}{key} {problem}")
    parent[leaf] = value


def decode(value: Any) -> Any:  # noqa: ANN401
    """The value of a text that is a Python literal; anything else unchanged."""
    if not isinstance(value, str) or len(value) > _MAX_LITERAL:
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def shown_key(key: str) -> str:
    """A key for a message, quoted and shortened if it is unusual."""
    return key if key and key.isprintable() and len(key) <= 80 else shown(key)


def _nearest(cfg: CfgNode, key: str) -> str:
    """A suggestion for an unknown key, for the end of a message."""
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


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a config, or of nested dictionaries, by full key, such as ``SOLVER.BASE_LR``."""
    values: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
