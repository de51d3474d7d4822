"""Importing public hypotheses: order, checks, and training records from them."""

import importlib.util
import json
from pathlib import Path

import pytest

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.training_records import build_training_records
from tests.helpers import datasets, isolated_cache, register_tiny_model, write_scenes

__all__ = ["datasets", "isolated_cache"]
ROOT = Path(__file__).resolve().parents[2]
NAMES = ["sky", "tree", "water", "wall"]
LINES = [[3], [1, 0], [2, 2, 0]]


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "import_public_hypotheses.py"
    spec = importlib.util.spec_from_file_location("import_public_hypotheses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path, datasets) -> Path:
    """A public file of three images of the data set ``reclip_test_import``."""
    records = write_scenes(tmp_path / "scenes", 3)
    datasets("reclip_test_import", records, NAMES)
    path = tmp_path / "public.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def read(path: Path) -> dict:
    return {line["image_id"]: line["classes"] for line in map(json.loads, path.read_text().splitlines()[1:])}


def run(tool, source: Path, *options: str) -> Path:
    output = source.parent / "out" / "hypotheses.jsonl"
    tool.main([str(source), str(output), "--dataset", "reclip_test_import", *options])
    return output


def error_of(tool, capsys, source: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(tool, source, *options)
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (source.parent / "out" / "hypotheses.jsonl").exists()
    return message


def test_in_the_order_of_the_data_set(tool, source):
    output = run(tool, source)
    assert read(output) == {"0_000": [3], "0_001": [0, 1], "0_002": [0, 2]}
    header = json.loads(output.read_text().splitlines()[0])
    assert header["method"] == "imported" and header["dataset"] == "reclip_test_import"
    assert header["class_names"] == [[name] for name in NAMES]


@pytest.mark.parametrize(
    "form", ["{:03d}", "{:03d}.jpg", "JPEGImages/{:03d}.JPG", "city/{:03d}_leftImg8bit.png", "{:03d} 1"]
)
def test_in_the_order_of_a_list_file(tool, source, form):
    list_file = source.parent / "train.txt"
    list_file.write_text("".join(form.format(i) + "\n" for i in (2, 0, 1)))
    assert read(run(tool, source, "--list", str(list_file))) == {"0_002": [3], "0_000": [0, 1], "0_001": [0, 2]}


def test_training_records_take_the_imported_sets(tool, source, tmp_path):
    output = run(tool, source)
    options = [
        "MODEL.CLIP.NAME", register_tiny_model(tmp_path), "MODEL.CLIP.PRETRAINED", "random",
        "MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('reclip_test_import',)",
        "HYPOTHESIS.METHOD", "imported", "HYPOTHESIS.FILE", str(output), "HYPOTHESIS.THRESHOLD", "0.5",
    ]  # fmt: skip
    records = build_training_records(load_config("", options))
    assert [record["hypothesis"] for record in records] == [[3], [0, 1], [0, 2]]
    with pytest.raises(ReclipError, match="import_public_hypotheses") as caught:
        build_training_records(load_config("", [*options, "HYPOTHESIS.FILE", str(tmp_path / "none.jsonl")]))
    assert "none.jsonl does not exist" in str(caught.value)
    with pytest.raises(ReclipError, match="METHOD imported needs HYPOTHESIS.FILE"):
        load_config("", [*options, "HYPOTHESIS.FILE", ""])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[]", "line 2 is an empty list"),
        ("[1, 4]", "line 2 has class id 4, but the data set has 4 classes, 0 to 3"),
        ("[-1]", "line 2 has class id -1"),
        ("[0, 1", "line 2 is not a JSON list"),
        ("3", "line 2 is not a JSON list"),
        ("[1.5]", "line 2 is not a JSON list"),
        ('["sky"]', "line 2 is not a JSON list"),
        ("[true]", "line 2 is not a JSON list"),
        ("", "line 2 is not a JSON list"),
    ],
)
def test_bad_lines(tool, capsys, source, line, expected):
    source.write_text(f"[0]\n{line}\n[1]\n")
    assert f"{source} {expected}" in error_of(tool, capsys, source)


@pytest.mark.parametrize("count", [2, 4])
def test_wrong_number_of_lines(tool, capsys, source, count):
    source.write_text("[0]\n" * count)
    assert f"has {count} lines for 3 images of reclip_test_import" in error_of(tool, capsys, source)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["000", "001"], "lacks 1 images of the data set, such as 002"),
        (["000", "001", "002", "009"], "line 4: '009' is not an image of the data set"),
        (["000", "001", "000"], "line 3: '000' is not an image of the data set, or is listed twice"),
        (["000", "", "002"], "line 2: '' is not an image"),
    ],
)
def test_a_list_of_other_images(tool, capsys, source, entries, expected):
    list_file = source.parent / "train.txt"
    list_file.write_text("\n".join(entries) + "\n")
    assert expected in error_of(tool, capsys, source, "--list", str(list_file))


def test_two_images_of_one_name(tool, capsys, source, datasets):
    datasets("reclip_test_twice", [{"file_name": "a/1.jpg"}, {"file_name": "b/1.jpg"}], NAMES)
    (source.parent / "train.txt").write_text("1\n")
    options = ("--dataset", "reclip_test_twice", "--list", str(source.parent / "train.txt"))
    assert "two images of the data set are called 1" in error_of(tool, capsys, source, *options)


def test_missing_files_an_unknown_data_set_and_an_output_that_exists(tool, capsys, source):
    assert "none.txt does not exist" in error_of(tool, capsys, source, "--list", str(source.parent / "none.txt"))
    assert "'reclip_test_none' is not registered" in error_of(tool, capsys, source, "--dataset", "reclip_test_none")
    assert "none.json does not exist: check the path" in error_of(tool, capsys, source.parent / "none.json")
    output = run(tool, source)
    before = output.read_bytes()
    source.write_text("[0]\n[0]\n[0]\n")
    with pytest.raises(SystemExit):
        run(tool, source)
    assert "exists: add --overwrite" in capsys.readouterr().err and output.read_bytes() == before
    assert read(run(tool, source, "--overwrite"))["0_000"] == [0]
