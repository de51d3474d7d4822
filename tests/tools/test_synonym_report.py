"""``tools/synonym_report.py`` on a few scenes of the embedded world."""

import importlib.util
import json
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from reclip_d2.errors import ReclipError
from tests.helpers import config_arguments, datasets, write_embedded_scenes

__all__ = ["datasets"]

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("synonym_report", ROOT / "tools" / "synonym_report.py")
synonym_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synonym_report)
OWN = list(MetadataCatalog.get("embedded_dev").stuff_classes)


@pytest.fixture
def world(tmp_path, datasets) -> str:
    return datasets("small_val", write_embedded_scenes(tmp_path, 2), OWN)


def run(*arguments: str) -> str:
    return synonym_report.main.__wrapped__(synonym_report.argument_parser().parse_args(arguments))


def test_report(tmp_path, world, capsys):
    words, output = tmp_path / "words.txt", tmp_path / "new" / "report.json"
    words.write_text("\n".join([f"{OWN[0]}, heaven", *OWN[1:]]))
    keys = ["DATASETS.TEST", f"('{world}',)", "MODEL.DEVICE", "cpu"]
    common = ["--synonyms", str(words), *config_arguments("embedded", "maskclip"), "--output", str(output)]
    table = run(*common, *keys)
    assert capsys.readouterr().out == table and "| sky → heaven |" in table and "mIoU with labels" in table
    content = json.loads(output.read_text())
    assert content["images"] == 2 and content["own"]["same_label"] == 100.0
    first, both = content["variants"].values()
    assert first["names"][0] == "heaven" and first == {**both, "names": first["names"]}
    assert 0 < first["same_label"] < 100 and first["labelled_mIoU"] > 10


def test_no_images(tmp_path):
    with pytest.raises(ReclipError, match="--images -1"):
        run("--synonyms", "x", "--images", "-1")
