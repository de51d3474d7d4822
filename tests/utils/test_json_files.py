"""Untrusted JSON: damaged, too deep or too large input raises one line, and never returns a value."""

import json

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MissingFileError
from reclip_d2.utils.json_files import MAX_DEPTH, JsonError, parse_json, read_json, read_json_lines

SCHEMA = {
    "type": "object",
    "required": ["name", "kind"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["a", "b"]}, "version": {"const": 1}},
}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("text", ['{"name": "x", "kind": "a"}', b'{"name": "\xc3\xa9", "kind": "b", "version": 1}'])
def test_sound_values(text):
    assert parse_json(text, SCHEMA)["kind"] in "ab"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ("{", "not JSON"),
        ("NaN", "not JSON: NaN is not a JSON number"),
        ('{"name": "x", "kind": -Infinity}', "not JSON: -Infinity is not a JSON number"),
        ("1" * 10_000, "not JSON"),  # Python reads no such integer
        (b"\xff\xfe", "not UTF-8 text"),
        ("[]", "at $: [] is not of type object"),
        ('{"kind": "a"}', "at $: name missing"),
        ('{"name": 3, "kind": "a"}', "at $.name: 3 is not of type string"),
        ('{"name": "123456789", "kind": "a"}', 'at $.name: "123456789" violates maxLength 8'),
        ('{"name": "x", "kind": "../c"}', 'at $.kind: "../c" is not one of ["a", "b"]'),
        ('{"name": "x", "kind": "a", "version": 2}', "at $.version: 2 instead of 1"),
        ('{"name": "x", "kind": "a", "more": 1}', 'at $: "more" is unknown'),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(JsonError) as caught:
        parse_json(text, SCHEMA)
    assert str(caught.value).startswith(message)


def test_depth():
    assert parse_json(nested(MAX_DEPTH)) is not None
    for depth in (MAX_DEPTH + 1, 500, 100_000):  # the last is beyond Python's own limit
        with pytest.raises(JsonError, match=f"^nested more than {MAX_DEPTH} deep$"):
            parse_json(nested(depth))
    with pytest.raises(JsonError, match="nested"):
        parse_json('{"a":' * 40 + "1" + "}" * 40)


def test_messages_are_short_lines():
    with pytest.raises(JsonError) as caught:
        parse_json(json.dumps({"name": "line\nend\x1b[31m" * 10_000, "kind": "a"}), SCHEMA)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_files(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(MissingFileError, match="settings .*x.json does not exist: remove it"):
        read_json(file, SCHEMA, "settings", "remove it")
    file.write_text('{"name": "x"}')
    with pytest.raises(ReclipError, match=r"^settings .*x.json is damaged \(at \$: kind missing\): remove it$"):
        read_json(file, SCHEMA, "settings", "remove it")
    file.write_text('{"name": "x", "kind": "a"}')
    assert read_json(file, SCHEMA, "settings", "remove it") == {"name": "x", "kind": "a"}
    with pytest.raises(ReclipError, match="more than the 16 bytes allowed"):
        read_json(file, SCHEMA, "settings", "remove it", max_bytes=16)


def test_lines_that_are_no_records_are_left_out(tmp_path):
    file = tmp_path / "x.jsonl"
    sound = '{"name": "x", "kind": "a"}'
    file.write_bytes(f'\n{sound}\n{{"name": "y", "ki\n{nested(99_999)}\n[]\n{sound}'.encode() + b"\n\xff\xfe\n\0\n")
    assert list(read_json_lines(file, SCHEMA)) == [{"name": "x", "kind": "a"}] * 2
    assert list(read_json_lines(tmp_path / "none", SCHEMA)) == []
    assert list(read_json_lines(tmp_path, SCHEMA)) == []
