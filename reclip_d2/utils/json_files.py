"""JSON files that may be damaged or untrusted: limited in size and depth, validated against a schema.

No value is used before it has been validated: a list in place of a name, or a path in place of a result's name, is
rejected with the file and the place in it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, MissingFileError, StrPath, display_path, open_regular, read_bytes
from reclip_d2.utils.text import shorten

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

MAX_BYTES = 256 * MIB
MAX_LINE_BYTES = 64 * MIB
MAX_DEPTH = 32

Schema = Mapping[str, Any]


class JsonError(ValueError):
    """A text is not JSON, or does not fit the schema; the message is one line, without the file's name."""


def parse_json(text: str | bytes, schema: Schema | None = None, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text (UTF-8 if it is bytes).

    Args:
        schema: JSON Schema (2020-12) of the value; None for any.
        max_depth: maximum depth of nested lists and objects.

    Raises:
        JsonError: the text is not JSON, is nested more deeply, or does not fit the schema.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise JsonError(f"nested more than {max_depth} deep") from error
    except ValueError as error:  # UnicodeDecodeError too, whose message quotes the whole input
        raise JsonError("not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}") from error
    _check_depth(value, max_depth)
    if schema is not None:
        check_schema(value, schema)
    return value


def read_json(path: StrPath, schema: Schema, what: str, remedy: str, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON file.

    Args:
        schema: see :func:`parse_json`.
        what: what errors call the file.
            remedy: the end of the error message.

        Raises:
            MissingFileError: the file does not exist.
            ReclipError: it cannot be read, is too large, or is damaged.
    """
    data = read_bytes(path, what, limit=max_bytes, remedy=remedy)
    try:
        return parse_json(data, schema)
    except JsonError as error:
        raise ReclipError(f"{what} {display_path(path)} is damaged ({error}): {remedy}") from error


def read_json_lines(path: StrPath, schema: Schema) -> Iterator[Any]:
    """Values of a JSON Lines file that serves as a cache: lines that do not fit the schema are skipped.

    A missing or unreadable file has no lines.
    """
    try:
        stream = open_regular(path)
    except ReclipError:
        return
    with stream:
        while line := stream.readline(MAX_LINE_BYTES):
            try:
                yield parse_json(line, schema)
            except JsonError:
                continue


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [x for item in nested for x in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise JsonError(f"nested more than {max_depth} deep")


def check_schema(value: Any, schema: Schema) -> None:
    """Raise :class:`JsonError` for a value that does not fit a schema, see :func:`parse_json`."""
    error = next(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value), None)
    if error is None:
        return
    # Not error.message, which quotes the value in full.
    wanted = error.validator_value
    rule = {
        "required": lambda: f"{', '.join(sorted(set(wanted) - set(error.instance)))} missing",
        "additionalProperties": lambda: f"{_shown(_unknown_key(error.instance, error.schema))} is unknown",
        "type": lambda: f"{_shown(error.instance)} is not of type {wanted}",
        "enum": lambda: f"{_shown(error.instance)} is not one of {_shown(wanted, 120)}",
        "const": lambda: f"{_shown(error.instance)} instead of {_shown(wanted)}",
    }.get(error.validator, lambda: f"{_shown(error.instance)} violates {error.validator} {_shown(wanted)}")
    raise JsonError(f"at {_shown(error.json_path, 80, quoted=False)}: {rule()}")


def _unknown_key(instance: Mapping[str, Any], schema: Schema) -> str:
    return next(key for key in instance if key not in schema.get("properties", {}))


def _shown(value: object, length: int = 60, quoted: bool = True) -> str:
    text = json.dumps(value) if quoted else str(value)
    text = text.encode("unicode_escape").decode()
    return shorten(text, length)


@functools.cache
def _validator(schema: str) -> Validator:
    import jsonschema  # here, since the import is slow and few commands need it

    return jsonschema.Draft202012Validator(json.loads(schema))


__all__ = ["JsonError", "MissingFileError", "check_schema", "parse_json", "read_json", "read_json_lines"]
