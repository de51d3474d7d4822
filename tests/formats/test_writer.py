"""Spools and streamed JSON."""

import io
import json
import os

import pytest

from reclip_d2.formats.writer import JsonSpool, Spool, write_json_array, write_json_arrays


def test_records_come_back_sorted_and_the_last_one_counts(tmp_path):
    spool = Spool(tmp_path / "made")
    for key, data in (("b", b"old"), ("c/é", b""), ("a", b"x" * 100_000), ("b", b"new")):
        spool.put(key, data)
    for _ in range(2):
        assert list(spool.items()) == [("a", b"x" * 100_000), ("b", b"new"), ("c/é", b"")]
    assert spool.keys() == ["a", "b", "c/é"]
    spool.close()
    assert os.listdir(tmp_path / "made") == []


def test_nothing_is_left_when_a_spool_is_dropped(tmp_path):
    spool = JsonSpool(tmp_path)
    spool.put_record("a", {"x": [1, None]})
    assert list(spool.records()) == [("a", {"x": [1, None]})]
    assert os.listdir(tmp_path) == []  # the file has no name: a killed process leaves none
    spool.close()


@pytest.mark.parametrize("records", [[], [1], [{"é": "雲"}, [2]]])
def test_streamed_json_is_json(records):
    stream = io.StringIO()
    write_json_array(stream, map(json.dumps, records))
    assert json.loads(stream.getvalue()) == records
    stream = io.StringIO()
    write_json_arrays(stream, {"info": {"é": 1}}, {"a": iter(records), "b": iter([]), "c": iter(records)})
    assert json.loads(stream.getvalue()) == {"info": {"é": 1}, "a": records, "b": [], "c": records}
