"""The hypothesis file: round trip, header, damage."""

import dataclasses
import json

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.file import HypothesisHeader, hypotheses_of, read_hypothesis_file, write_hypothesis_file

HEADER = HypothesisHeader(
    dataset="scenes_train",
    class_names=[["sky"], ["tall tree", "oak"], ["water"]],
    clip="tiny",
    fingerprint="f" * 64,
    templates="photo",
    method="crops",
    window_ratio=0.166667,
)
LINES = [
    {"image_id": "a", "top1": [0, 0, 1, 0], "top1_calibrated": [2, 2, 1, 2]},
    {"image_id": "bö", "top1": [2, 2, 2, 2], "top1_calibrated": [0, 0, 0, 1]},
]


def write(path, lines=LINES, header=HEADER):
    write_hypothesis_file(path, header, lines)
    return path


def message_of(path, header=HEADER) -> str:
    with pytest.raises(ReclipError) as caught:
        read_hypothesis_file(path, header)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert "remove it, and the next run computes it again, or set HYPOTHESIS.FILE" in message
    return message


def test_round_trip(tmp_path):
    path = write(tmp_path / "folder" / "h.jsonl")
    assert read_hypothesis_file(path, HEADER) == {line["image_id"]: line for line in LINES}
    assert [entry.name for entry in path.parent.iterdir()] == ["h.jsonl"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    path = write(tmp_path / "h.jsonl")
    content = path.read_bytes()

    def lines():
        yield LINES[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write(path, lines())
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["h.jsonl"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "scenes_val"),
        ("class_names", [["sky"], ["tall tree"], ["water"]]),
        ("clip", "other"),
        ("fingerprint", "e" * 64),
        ("templates", "imagenet"),
        ("method", "image"),
        ("window_ratio", 0.25),
    ],
)
def test_another_header_names_the_field(tmp_path, field, value):
    path = write(tmp_path / "h.jsonl")
    message = message_of(path, dataclasses.replace(HEADER, **{field: value}))
    assert f"made with another {field} " in message
    shown = str(value) if len(str(value)) <= 60 else str(value)[:57]
    assert f"instead of {shown}" in message


def test_missing_file_and_folder(tmp_path):
    assert "cannot be read" in message_of(tmp_path / "none.jsonl") or "does not exist" in message_of(
        tmp_path / "none.jsonl"
    )
    message_of(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "[]\n", "3\n", '{"format": "other"}\n', '{"dataset": "x"}\n'])
def test_not_a_hypothesis_file(tmp_path, content):
    path = tmp_path / "h.jsonl"
    path.write_text(content)
    assert "is not a hypothesis file" in message_of(path) or "is damaged" in message_of(path)


@pytest.mark.parametrize(
    "line",
    ["{", '{"image_id": "c", "top1": [1', "null", "[1]", '{"top1": [0]}', "7", '{"image_id": ["c"]}', "[" * 100_000,
     '{"image_id": "c", "top1": [NaN]}', '{"image_id": "c", "size": ' + "1" * 9999 + "}", "\x00", "\udcff"],
    ids=range(12),
)  # fmt: skip
def test_damaged_line(tmp_path, line):
    path = write(tmp_path / "h.jsonl")
    with path.open("a", errors="surrogateescape") as stream:
        stream.write(line)
    message = message_of(path)
    assert "is damaged (line " in message and len(message) < 400


def test_binary_rubbish_and_a_field_too_many(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x01" * 20)
    message_of(path)
    head = {"format": "reclip_d2 hypothesis 1", **dataclasses.asdict(HEADER), "colour": "red"}
    path.write_text(json.dumps(head) + "\n")
    assert "is damaged" in message_of(path)


@pytest.mark.parametrize(
    "change", [{"class_names": "sky"}, {"class_names": [3]}, {"window_ratio": "1"}, {"method": "x"}, {"images": None}]
)
def test_a_header_of_another_shape(tmp_path, change):
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps({"format": "reclip_d2 hypothesis 1", **dataclasses.asdict(HEADER), **change}) + "\n")
    assert f"is damaged (line 1: at $.{next(iter(change))}" in message_of(path)


# ---- from lines to H ------------------------------------------------------------------------------------------


@pytest.fixture
def lines() -> dict:
    return {line["image_id"]: line for line in LINES}


def test_crops_rule(lines):
    assert hypotheses_of(lines, HEADER, ["a", "bö"], 0.0) == {"a": [0, 1], "bö": [2]}
    assert hypotheses_of(lines, HEADER, ["a"], 0.25) == {"a": [0]}
    assert hypotheses_of(lines, HEADER, ["a", "bö"], 0.25, calibrated=True) == {"a": [2], "bö": [0]}


def test_image_rule():
    header = dataclasses.replace(HEADER, method="image", window_ratio=0.0)
    lines = {"a": {"image_id": "a", "scores": [0.3, 0.1, 0.24]}}
    assert hypotheses_of(lines, header, ["a"], 0.23) == {"a": [0, 2]}
    assert hypotheses_of(lines, header, ["a"], 0.5) == {"a": [0]}


def test_missing_image(lines):
    with pytest.raises(ReclipError, match="no line for image 'c' of scenes_train"):
        hypotheses_of(lines, HEADER, ["a", "c"], 0.0)


@pytest.mark.parametrize(
    "line",
    [
        {"image_id": "a"},
        {"image_id": "a", "top1": []},
        {"image_id": "a", "top1": None},
        {"image_id": "a", "top1": [0, 3]},
        {"image_id": "a", "top1": [-1]},
        {"image_id": "a", "top1": [0.5]},
        {"image_id": "a", "top1": "01"},
    ],
)
def test_a_line_without_sound_classes(line):
    with pytest.raises(ReclipError, match="image 'a' is damaged") as caught:
        hypotheses_of({"a": line}, HEADER, ["a"], 0.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scores", [None, [], [0.1, 0.2], [0.1, 0.2, "x"], [0.1, 0.2, 0.3, 0.4]])
def test_a_line_without_sound_scores(scores):
    header = dataclasses.replace(HEADER, method="image", window_ratio=0.0)
    with pytest.raises(ReclipError, match="image 'a' is damaged"):
        hypotheses_of({"a": {"image_id": "a", "scores": scores}}, header, ["a"], 0.0)


# ---- imported sets ----------------------------------------------------------------------------------------------

IMPORTED = dataclasses.replace(HEADER, clip="", fingerprint="", templates="", method="imported", window_ratio=0.0)


def test_imported_sets_are_taken_as_they_are():
    lines = {"a": {"image_id": "a", "classes": [2, 0]}, "b": {"image_id": "b", "classes": [1]}}
    for threshold, calibrated in ((0.0, False), (0.9, True)):
        assert hypotheses_of(lines, IMPORTED, ["b", "a"], threshold, calibrated) == {"b": [1], "a": [0, 2]}


@pytest.mark.parametrize("classes", [None, [], [3], [-1], [0.5], "01"])
def test_imported_sets_that_are_damaged(classes):
    with pytest.raises(ReclipError, match=r"image 'a' is damaged \(classes\)"):
        hypotheses_of({"a": {"image_id": "a", "classes": classes}}, IMPORTED, ["a"], 0.0)


def test_imported_file_does_not_depend_on_the_clip(tmp_path):
    path = write(tmp_path / "h.jsonl", [{"image_id": "a", "classes": [1]}], IMPORTED)
    expected = dataclasses.replace(HEADER, method="imported", window_ratio=0.0)  # of some CLIP and template set
    assert read_hypothesis_file(path, expected)["a"]["classes"] == [1]
    for field, value in (("dataset", "other"), ("class_names", [["sky"]])):
        assert f"made with another {field} " in message_of(path, dataclasses.replace(expected, **{field: value}))
    assert "made with another method imported instead of crops" in message_of(path)
    crops = write(tmp_path / "crops.jsonl")
    assert "made with another method crops instead of imported" in message_of(crops, expected)


@pytest.mark.parametrize("size", [[0, 0], [10**12, 3], [True, 3], "3 x 3", [3], None, [3.0, 3.0]])
def test_windows_and_size(size):
    """At half of the image there are 3 x 3 windows; a line of another number, or without a sound size, is damaged."""
    header = dataclasses.replace(HEADER, window_ratio=0.5)
    line = {"image_id": "a", "size": [4, 4], "top1": [0] * 9}
    assert hypotheses_of({"a": line}, header, ["a"], 0.0) == {"a": [0]}
    with pytest.raises(ReclipError, match="'a' is damaged"):
        hypotheses_of({"a": {**line, "top1": [0] * 8}}, header, ["a"], 0.0)
    with pytest.raises(ReclipError, match="'a' is damaged"):
        hypotheses_of({"a": {**line, "size": size}}, header, ["a"], 0.0)


def test_two_lines_of_an_image(tmp_path, lines):
    path = tmp_path / "h.jsonl"
    write_hypothesis_file(path, HEADER, [*LINES, LINES[0]])
    assert read_hypothesis_file(path, HEADER) == lines
    write_hypothesis_file(path, HEADER, [*LINES, {**LINES[0], "top1": [1, 1, 1, 1]}])
    with pytest.raises(ReclipError, match="line 4: another line of its image"):
        read_hypothesis_file(path, HEADER)
