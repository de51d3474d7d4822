"""Output folders that come from somebody else, or were damaged: nothing outside them is touched."""

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest

from reclip_d2.data.class_file import ClassList, parse_classes
from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.workspace.run_folder import RunFolder, begin_results, check_same_inputs
from reclip_d2.workspace.run_state import RunState

RESULTS = {"model": "rectified", "background": "ignore"}


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file and a folder next to the output folder, which no test may change."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    yield folder
    assert (folder / "a.jpg").read_text() == "mine" and sorted(folder.iterdir()) == [folder / "a.jpg"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A folder with masks."""
    result = RunFolder(tmp_path / "out")
    state = RunState(
        ClassList((("sky", "heaven"), ("wood",)), ("road",)), "tiny", "", "w", {"rectified": {"SEED": "0"}}, RESULTS
    )
    state.entries = ["masks", "summary.json"]
    result.write(state)
    result.masks.mkdir()
    (result.masks / "a.png").write_text("mask")
    result.summary.write_text("{}")
    return result


def tamper(folder: RunFolder, **changes: object) -> None:
    content = json.loads(folder.marker.read_text())
    folder.marker.write_text(json.dumps({**content, **changes}))


def test_the_state_comes_back(folder):
    state = folder.read()
    assert state.classes.classes == (("sky", "heaven"), ("wood",)) and state.classes.background == ("road",)
    assert state.results == RESULTS and state.entries == ["masks", "summary.json"]


def test_queries_come_back_in_their_order(folder):
    classes = parse_classes("\n".join(f"c{i}; q{i}, r{i}; s{i}" for i in range(12)), "c.txt")
    state = dataclasses.replace(folder.read(), classes=classes)
    folder.write(state)
    read = folder.read().classes
    assert read.model_classes == classes.model_classes and read.entries == classes.entries
    content = json.loads(folder.marker.read_text())["classes"]
    tamper(folder, classes={**content, "queries": {"12": [["x"]]}})
    with pytest.raises(ReclipError, match="queries of a class that is not in its list"):
        folder.read()


def test_other_queries_are_other_inputs(folder):
    known = folder.read()
    folder.hypotheses.parent.mkdir(parents=True, exist_ok=True)
    folder.hypotheses.write_text("")
    wanted = dataclasses.replace(known, classes=dataclasses.replace(known.classes, queries=((1, ("oak",)),)))
    with pytest.raises(ReclipError, match=r"other --classes \(number 2 was wood and is wood; oak\)"):
        check_same_inputs(folder, known, wanted)


@pytest.mark.parametrize(
    "entry", ["../photos", "../notes.txt", "/", "", ".", "masks/../../photos", "run", "x", 3, None]
)
def test_entries_are_names_of_results_alone(folder, canary, tmp_path, entry):
    if entry == "/":
        entry = str(tmp_path / "notes.txt")
    tamper(folder, entries=["masks", entry])
    with pytest.raises(ReclipError, match=r"reclip.json is damaged \(at \$.entries\[1\]"):
        folder.read()
    (folder.path / "mine.txt").write_text("kept")
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"results": {"model": "../../photos", "background": "ignore"}},
        {"results": {"model": "rectified", "background": "/../../photos"}},
        {"results": {"model": "rectified"}},
        {"results": []},
        {"settings": {"../x": {}}},
        {"settings": {"rectified": {"SEED": 0}}},
        {"classes": {"classes": [], "background": []}},
        {"classes": {"classes": [[]], "background": []}},
        {"classes": {"classes": "sky", "background": []}},
        {"classes": None},
        {"format": "reclip_d2 run 2"},
        {"pretrained": ["x"]},
        {"more": 1},
    ],
)
def test_other_damage_is_refused_by_name(folder, canary, changes):
    tamper(folder, **changes)
    with pytest.raises(ReclipError, match=r"run file .*reclip.json is damaged \(.*\): give --overwrite to start over"):
        folder.read()
    folder.clear()
    assert not list(folder.path.iterdir())


def test_rubbish_in_place_of_the_state(folder):
    rng = random.Random(0)
    sound = folder.marker.read_bytes()
    cases = [b"", b"\0", b"null", b"[" * 100_000, b'{"a":' * 5_000, b"\xff\xfe{}", rng.randbytes(1000)]
    cases += [sound[: rng.randrange(len(sound))] for _ in range(20)]
    for text in cases:
        folder.marker.write_bytes(text)
        with pytest.raises(ReclipError, match="reclip.json is damaged"):
            folder.read()


def test_links_are_removed_and_not_followed(folder, canary):
    os.rename(folder.masks, folder.path / "elsewhere")
    folder.masks.symlink_to(canary)
    folder.run.symlink_to(canary)
    (folder.path / "previous-student-keep").symlink_to(canary)
    with pytest.raises(ReclipError, match="masks is a symbolic link"):
        folder.check_links()
    with folder.lock():
        folder.clear()
    folder.check_links()
    assert [path.name for path in folder.path.iterdir() if path.name != ".lock"] == ["elsewhere"]


def test_links_below_results(folder, canary):
    (folder.masks / "street").symlink_to(canary)
    with pytest.raises(ReclipError, match="masks/street is a symbolic link"):
        folder.check_links()
    (folder.masks / "street").unlink()
    (folder.masks / "a.jpg").symlink_to(canary / "a.jpg")  # formats put links to images into their folders
    folder.check_links()


def test_other_folders_called_previous_stay(folder):
    for name in ("previous-year", "previous-student-keep"):
        (folder.path / name / "masks").mkdir(parents=True)
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["previous-year"]


def test_results_are_moved_aside_and_come_back(folder, capsys):
    state = folder.read()
    begin_results(folder, state, {"model": "maskclip", "background": "keep"}, ["masks", "overlay"])
    aside = folder.path / "previous-rectified-ignore"
    assert (aside / "masks" / "a.png").exists() and not folder.masks.exists()
    (aside / "notes.txt").write_text("mine")
    folder.masks.mkdir()
    begin_results(folder, state, RESULTS, ["masks"])
    assert (folder.masks / "a.png").read_text() == "mask" and folder.read().entries == ["masks", "summary.json"]
    assert (aside / "notes.txt").read_text() == "mine"


def test_what_a_killed_run_leaves_is_no_other_file(tmp_path):
    folder = RunFolder(tmp_path / "out")
    with folder.lock():
        temporary = folder.path / ".reclip.json.0a1b2c3d.tmp.json"
        temporary.write_text("half")
    assert not folder.is_used()
    with folder.lock():
        assert not temporary.exists()
    for name in (".reclip.json.0a1b2c3d.tmp", ".notes.json.0a1b2c3d.tmp.json", "a.jpg"):
        (folder.path / name).touch()
        with pytest.raises(ReclipError, match="contains other files"):
            folder.is_used()
        (folder.path / name).unlink()


def test_leftovers_of_killed_runs_are_removed(folder):
    model = folder.run / "rectified" / "model_final.pth"
    for path in (folder.marker, folder.summary, folder.run / "images.json", model):
        with atomic_write(path) as temporary:
            left = temporary.name
        path.with_name(left).touch()  # as if the process had been killed before the rename
    tiles = folder.run / "working" / ".tiles.12345678.tmp" / "fresh"
    tiles.mkdir(parents=True)
    mine = folder.path / ".notes.12345678.tmp"
    mine.touch()
    with folder.lock():
        found = {path.name for path in folder.path.rglob(".*")}
    assert found == {".lock", mine.name}


@pytest.mark.parametrize("name", ["loop", "x" * 300, "nul\0"])
def test_paths_that_lead_nowhere(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ReclipError, OSError)) as caught:
        folder = RunFolder(tmp_path / name)
        folder.is_used()
        with folder.lock():
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("attention", "refused"), [("value", False), ("other", True)])
def test_folders_of_before_were_made_with_the_value_path(folder, attention, refused):
    known = folder.read()
    wanted = dataclasses.replace(known, settings={"rectified": {"SEED": "0", "MODEL.CLIP.DENSE_ATTENTION": attention}})
    if not refused:
        return check_same_inputs(folder, known, wanted)
    with pytest.raises(ReclipError, match="made with MODEL.CLIP.DENSE_ATTENTION value instead of other"):
        check_same_inputs(folder, known, wanted)
