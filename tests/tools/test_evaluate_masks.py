"""``tools/evaluate_masks.py`` from its arguments to the printed and written scores."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers import datasets, write_scenes  # noqa: F401  (datasets is a fixture)
from tools.evaluate_masks import main

NAME = "reclip_test_evaluate_masks"


@pytest.fixture
def masks(tmp_path, datasets):  # noqa: F811
    """Folder with the labels of two registered scenes as masks."""
    records = write_scenes(tmp_path / "val", 2)
    datasets(NAME, records, ["a", "b", "c", "d"])
    folder = tmp_path / "masks"
    folder.mkdir()
    for record in records:
        name = record["file_name"].rsplit("/", 1)[-1].rsplit(".", 1)[0]
        (folder / f"{name}.png").write_bytes(open(record["sem_seg_file_name"], "rb").read())
    return folder


def test_ids_of_the_data_set(masks, tmp_path, capsys):
    main([str(masks), "--dataset", NAME, "--bias", "--json", str(tmp_path / "scores.json")])
    printed = capsys.readouterr().out
    assert "2 images" in printed and "space preference" in printed
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["scores"]["mIoU"] == 100 and written["images"] == 2 and written["clusters"] is None
    assert written["class_preference"] == 1 and written["space_preference"]["IoU-0-40px"] == 100


def test_names_in_another_order(masks, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("b\na\nc\nd, dee\n")
    main([str(masks), "--dataset", NAME, "--names", str(names), "--json", str(tmp_path / "scores.json")])
    swapped = json.loads((tmp_path / "scores.json").read_text())
    assert swapped["ious"]["a"] == 0 and swapped["ious"]["c"] in (100, None)


def test_hungarian(masks, tmp_path, capsys):
    for path in masks.iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 255, (labels + 1) % 4).astype(np.uint8)).save(path)
    main([str(masks), "--dataset", NAME, "--hungarian", "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["mIoU"] == 100
    assert "clusters, matched by labels: 0 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere"], "data set 'nowhere' is not registered"),
        (["--dataset", NAME, "--hungarian", "--names", "x.txt"], "give one of them"),
        (["--dataset", NAME, "--names", "x.txt"], "class file x.txt"),
        (["--dataset", NAME, "--suffix", "_p"], "images have no mask"),
    ],
)
def test_errors(masks, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(masks), *arguments])
    assert stop.value.code != 0 and message in capsys.readouterr().err
