"""Whose masks a run keeps, and the record of it."""

import json

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_free import Verdict
from reclip_d2.workspace.decision import Decision, asked_for, judged, total_pixels


def test_what_is_asked_for():
    assert [asked_for("rectified", trained).kept for trained in ("student", "rectified")] == ["student", "rectified"]
    assert asked_for("maskclip", "student").kept == "maskclip"
    assert asked_for("maskclip", "rectified").reason == "kept the masks of maskclip, as --keep maskclip asks"
    verdict = Verdict("student", {"maskclip": 1.0, "student": 2.0}, "why", None)
    assert judged(verdict, "student") == Decision("best", "student", "student", "why", "", verdict.scores)


def test_written_and_read(tmp_path):
    file = tmp_path / "decision.json"
    assert Decision.read(file) is None
    decision = Decision("rectified", "student", "student", "why", "look", {"maskclip": 0.5}, {"maskclip": {"0": 3}})
    decision.write(file)
    assert Decision.read(file) == decision


@pytest.mark.parametrize(
    "change", [{"kept": "mine"}, {"pixels": {"maskclip": {"sky": 3}}}, {"scores": {"maskclip": "high"}}, {"more": 1}]
)
def test_a_damaged_record(tmp_path, change):
    file = tmp_path / "decision.json"
    asked_for("maskclip", "rectified").write(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ReclipError, match=r"decision\.json is damaged.*remove it, and run again"):
        Decision.read(file)


def test_total_pixels():
    coverage = {"a": {"0": 3, "2": 1}, "b": {"0": 2, "255": 5}}
    assert total_pixels(coverage, None) == {"0": 5, "2": 1, "255": 5}
    assert total_pixels({"a": {"0": 3, "2": 1}, "b": {"2": 4}}, 2) == {"0": 3, "255": 5}
