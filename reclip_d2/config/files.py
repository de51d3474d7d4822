"""Find and merge config files.

Files are merged in order; later ones win. In addition to keys, a file may have

- ``_BASE_``: a file, or a list of files, to merge before this one, as in Detectron2. Paths are relative to the file.
- ``_DATASET_``: name of the data set, which replaces ``{_DATASET_}`` in the values of all files.
- ``_METHOD_``: name of the file's method.
- ``_METHODS_``: in a data set's file, sections of keys by method. Each is merged right after the file with that
  ``_METHOD_``, even if that is a ``_BASE_``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reclip_d2.config.rules import MAX_TEXT, shown
from reclip_d2.config.yaml_file import MAX_DEPTH, read_yaml
from reclip_d2.errors import ReclipError, UsageError
from reclip_d2.utils.files import StrPath

BASE_KEY = "_BASE_"
DATASET_KEY = "_DATASET_"
METHOD_KEY = "_METHOD_"
METHODS_KEY = "_METHODS_"
PLACEHOLDER = f"{{{DATASET_KEY}}}"
# Maximum number of files of a config, including bases.
MAX_FILES = 64
# Former files in configs/, and the files that replace them.
_OLD_BASES = {
    "Base-student.yaml": "methods/Base-student.yaml",
    "Base-MaskCLIP-plus.yaml": "methods/maskclip_plus.yaml",
    "Base-ReCLIP-CVPR24.yaml": "methods/reclip_rectify.yaml",
}


class Value(NamedTuple):
    """A value and its file."""

    value: Any
    source: str


def configs_folder() -> Path:
    """Folder of the package's configs: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config_file(path: str) -> str:
    """Path of a config file; for ``configs/...`` that is not in the working folder, the package's own.

    Raises:
        UsageError: the name is that of a former config file, which is two files now.
    """
    if not path or os.path.exists(path):
        return path
    parts = Path(path).parts
    if parts[:1] == ("configs",) and ".." not in parts:
        own = configs_folder().joinpath(*parts[1:])
        if own.is_file():
            return str(own)
    _refuse_old_name(path)
    return path


def _refuse_old_name(path: str) -> None:
    """Name the replacements of ``configs/voc20/reclippp_rectify.yaml``, ``configs/voc20/Base-voc20.yaml`` and so on."""
    *folders, name = Path(path).parts
    if "configs" not in folders:
        return
    folders = folders[len(folders) - folders[::-1].index("configs") :]
    files = [_OLD_BASES[name]] if not folders and name in _OLD_BASES else []
    if folders:
        files.append(f"datasets/{'-'.join(folders)}.yaml")
    if folders and name not in (f"Base-{folders[-1]}.yaml", "Base-input.yaml"):
        files.append(f"methods/{name}")
    if files and all((configs_folder() / file).is_file() for file in files):
        arguments = " ".join(f"--config-file configs/{file}" for file in files)
        raise UsageError(f"config file {path} no longer exists: give {arguments}")


class ConfigFiles:
    """Config files merged in order.

    Attributes:
        names: paths of the given files, without bases.
        values: by full key, such as ``SOLVER.BASE_LR``.
        dataset: ``_DATASET_``; "" if no file has one.

    Args:
        files: paths; see :func:`find_config_file`.
        bases: allow ``_BASE_`` and the other keys of this module. False for files of unknown origin, which must not
            choose what else is read.

    Raises:
        ReclipError: a file or base is missing, is not plain YAML or has no keys; bases form a cycle; or a section comes
            after its method.
    """

    def __init__(self, files: Sequence[StrPath], *, bases: bool = True) -> None:
        self.names = [find_config_file(os.fspath(file)) for file in files]
        self.values: dict[str, Value] = {}
        self.dataset = ""
        self._sections: dict[str, dict[str, Value]] = {}
        self._methods: dict[str, str] = {}
        self._bases = bases
        self._count = 0
        for name in self.names:
            self._merge(name, "config file", ())
        if self.dataset:
            self.values = {
                key: Value(_filled_in(value, self.dataset), source) for key, (value, source) in self.values.items()
            }

    def __str__(self) -> str:
        """``config file a.yaml`` or ``config files a.yaml, b.yaml``, for messages."""
        return f"config file{'s' if len(self.names) > 1 else ''} {', '.join(self.names)}"

    def _merge(self, path: str, what: str, chain: tuple[str, ...]) -> None:
        """Merge a file's bases, the file, and the section of its method.

        Args:
            what: name of the file in messages.
            chain: real paths of the files that led to this base.
        """
        self._count += 1
        if self._count > MAX_FILES:
            raise ReclipError(f"{what} {path}: the config has more than {MAX_FILES} files, counting each {BASE_KEY}")
        tree = read_yaml(path, what)
        if not isinstance(tree, dict) or not tree or not all(isinstance(key, str) for key in tree):
            raise ReclipError(f"{what} {path} has no keys: expected KEY: value lines")
        own = {key: tree.pop(key) for key in (BASE_KEY, DATASET_KEY, METHOD_KEY, METHODS_KEY) if key in tree}
        if own and not self._bases:
            raise ReclipError(
                f"{what} {path} has {next(iter(own))}, which is not allowed in a model's config: remove it"
            )
        source = f"config file {path}"
        real = (*chain, os.path.realpath(path))
        for name in _base_names(own.get(BASE_KEY, []), source):
            base = os.path.join(os.path.dirname(path), os.path.expanduser(name))
            if os.path.realpath(base) in real:
                raise ReclipError(f"{source}: its {BASE_KEY} files form a cycle")
            if os.path.realpath(os.path.normpath(base)) == os.path.realpath(base):  # false if ".." follows a link
                base = os.path.normpath(base)
            if not os.path.exists(base):
                _refuse_old_name(base)
            self._merge(base, f"{source}: its {BASE_KEY}", real)
        if DATASET_KEY in own:
            self.dataset = _name(own[DATASET_KEY], f"{source}: {DATASET_KEY}")
        self._add_sections(own.get(METHODS_KEY, {}), source)
        self.values |= _values(tree, source)
        if METHOD_KEY in own:
            method = _name(own[METHOD_KEY], f"{source}: {METHOD_KEY}")
            self._methods.setdefault(method, path)
            self.values |= self._sections.get(method, {})

    def _add_sections(self, sections: Any, source: str) -> None:  # noqa: ANN401
        if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
            raise ReclipError(f"{source}: {METHODS_KEY} must be METHOD: lines with keys below them")
        for method, keys in sections.items():
            if method in self._methods:
                raise ReclipError(f"{source} has {METHODS_KEY} for {method}: give it before {self._methods[method]}")
            section = _values(keys, f"{source}, {METHODS_KEY} {method}")
            self._sections[method] = self._sections.get(method, {}) | section


def _base_names(names: Any, source: str) -> list[str]:  # noqa: ANN401
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > MAX_TEXT:
            raise ReclipError(f"{source}: {BASE_KEY} is {shown(name)}; it must be a file or a list of files")
        if "://" in name:
            raise ReclipError(f"{source}: {BASE_KEY} {shown(name)} is a URL: download the file and give its path")
    return names


def _name(value: Any, what: str) -> str:  # noqa: ANN401
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_TEXT:
        raise ReclipError(f"{what} is {shown(value)}; it must be a name")
    return value


def _values(tree: Mapping[str, Any], source: str) -> dict[str, Value]:
    return {key: Value(value, source) for key, value in _leaves(tree, source)}


def _leaves(tree: Mapping[str, Any], source: str, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Full keys and values of nested dicts; empty dicts are values."""
    for key, value in tree.items():
        if not isinstance(key, str) or depth > MAX_DEPTH:
            raise ReclipError(f"{source}: {prefix}{shown(key)} is not a key")
        if isinstance(value, dict) and value:
            yield from _leaves(value, source, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _filled_in(value: Any, dataset: str) -> Any:  # noqa: ANN401
    return value.replace(PLACEHOLDER, dataset) if isinstance(value, str) else value


def add_config_file_argument(parser: argparse.ArgumentParser, of: str = "", **options: Any) -> None:  # noqa: ANN401
    """Add ``--config-file FILE``, which can be repeated, to a program's arguments.

    Args:
        of: for the help, whose config it is, such as " of the model".
        options: passed to ``add_argument``.
    """
    parser.add_argument(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help=f"config file{of}; repeat it to merge several, the data set's before the method's; later ones win",
        **options,
    )
