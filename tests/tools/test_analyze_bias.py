"""The program that measures and draws the biases, on a data set of a few small files and tiny models."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.engine import program as training
from reclip_d2.engine import trainer
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import datasets, isolated_cache, tiny_config, write_scenes

__all__ = ["datasets", "isolated_cache"]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["sky", "tall tree", "water", "brick wall"]

spec = importlib.util.spec_from_file_location("analyze_bias", ROOT / "tools" / "analyze_bias.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


@pytest.fixture
def scene(tmp_path, datasets) -> Path:
    """A folder with a config file, a checkpoint of random weights, and two registered data sets, one unlabelled."""
    # Their sizes differ, and are not multiples of the patch.
    labelled = write_scenes(tmp_path / "val", 2, size=(36, 44)) + write_scenes(
        tmp_path / "tall", 1, size=(52, 30), seed=1
    )
    datasets("reclip_test_val", labelled, NAMES)
    unlabelled = [{k: v for k, v in r.items() if k != "sem_seg_file_name"} for r in labelled]
    datasets("reclip_test_unlabelled", unlabelled, NAMES)
    (tmp_path / "config.yaml").write_text(
        f"""
{tiny_config(tmp_path)}
DATASETS: {{TRAIN: [], TEST: [reclip_test_val]}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TEST: 32}}
TEST: {{BIAS: {{BIN_WIDTH: 8, MIN_OBJECT_AREA: 10, MIN_BIN_OBJECTS: 1}}}}
"""
    )
    for name, keys in (("model", ()), ("plain", ("MODEL.MASK_DECODER.ENABLED", "False"))):
        torch.manual_seed(1)
        model = trainer.Trainer.build_model(load_config(str(tmp_path / "config.yaml"), keys))
        ReclipCheckpointer(model, str(tmp_path)).save(name)
    return tmp_path


def run(scene: Path, *arguments: str) -> Path:
    output = scene / "out"
    common = ["--config-file", str(scene / "config.yaml"), "--name", "ReCLIP++", "--output-dir", str(output)]
    program.main([*common, "--scenes", "2", *arguments])
    return output


def fails(scene: Path, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(scene, *arguments)
    assert caught.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def assert_complete(output: Path) -> tuple[dict, str]:
    """The numbers and the page's text; every picture is a file and is in the page."""
    numbers, page = json.loads((output / "bias.json").read_text()), (output / "index.html").read_text()
    assert page.count("<img src=") == len(numbers["pictures"]) == len(set(numbers["pictures"]))
    assert sorted(path.name for path in output.glob("*.png")) == sorted(numbers["pictures"])
    for name in numbers["pictures"]:
        with Image.open(output / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 150
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page  # self-contained
    return numbers, re.sub(r'data:image/png;base64,[^"]*', "", page)


def test_labelled_data_with_a_comparison(scene, capsys):
    (scene / "plain.yaml").write_text("_BASE_: config.yaml\nMODEL: {MASK_DECODER: {ENABLED: False}}\n")
    calibrated = scene / "calibrated.yaml"
    calibrated.write_text("_BASE_: config.yaml\nMODEL: {META_ARCHITECTURE: MaskCLIP, MASKCLIP: {MEAN_FILTER: 3}}\n")
    plain = f"no decoder=<b>={scene}/plain.yaml:{scene}/plain.pth".replace("=<b>=", " <b>=")
    output = run(
        scene, "--scenes", "1", "--weights", str(scene / "model.pth"), "--compare", plain, f"filter={calibrated}"
    )
    numbers, page = assert_complete(output)
    models = {model["name"]: model for model in numbers["models"]}
    assert list(models) == ["MaskCLIP", "no decoder <b>", "filter", "ReCLIP++"]
    assert numbers["labelled"] and numbers["images"] == 3 and numbers["bin_width"] == 8
    assert "no decoder &lt;b&gt;" in page and "<b>" not in page
    pictures = {"fig1a_distance.png", "fig1b_confusion.png", "class_iou.png", "fig5_predictions.png"}
    pictures |= {f"preference_{name}.png" for name in ("MaskCLIP", "no_decoder_b", "filter", "ReCLIP++")}
    pictures |= {f"fig4_{name}_0_000.png" for name in ("no_decoder_b", "ReCLIP++")}
    assert set(numbers["pictures"]) == pictures

    # The same numbers as train_net.py's.
    keys = ["TEST.BIAS.ENABLED", "True", "MODEL.WEIGHTS", str(scene / "model.pth"), "OUTPUT_DIR", str(scene / "eval")]
    arguments = ["--config-file", str(scene / "config.yaml"), "--eval-only", *keys]
    expected = training.main(training.argument_parser().parse_args(arguments))
    results = models["ReCLIP++"]["results"]
    assert results["sem_seg"]["mIoU"] == expected["sem_seg"]["mIoU"]
    assert results["class_preference"]["score"] == expected["class_preference"]["score"]
    assert results["space_preference"]["score"] == pytest.approx(expected["space_preference"]["score"], nan_ok=True)
    difference = models["ReCLIP++"]["space_preference_against_first"]["difference"]
    scores = [models[name]["results"]["space_preference"]["score"] for name in ("MaskCLIP", "ReCLIP++")]
    assert difference == pytest.approx(scores[1] - scores[0], abs=1e-12)
    assert models["MaskCLIP"]["preference"]["source"] == "mean soft-max"
    assert models["ReCLIP++"]["preference"]["source"] == "bias logits"
    assert -1 <= models["ReCLIP++"]["correlation_with_mean_soft_max"]["classes"] <= 1
    assert "class preference" in capsys.readouterr().out


def test_without_labels_the_rest_is_drawn(scene, capsys):
    output = run(scene, "--weights", str(scene / "model.pth"), "--dataset", "reclip_test_unlabelled")
    numbers, page = assert_complete(output)
    assert not numbers["labelled"] and "have no labels" in page and "ground truth (without one" in page
    assert set(numbers["pictures"]) == {
        "preference_MaskCLIP.png",
        "preference_ReCLIP++.png",
        "fig4_ReCLIP++_0_000.png",
        "fig4_ReCLIP++_1_000.png",
        "fig5_predictions.png",
    }
    assert all(not model["results"] for model in numbers["models"])
    assert "skipping scores" in capsys.readouterr().out


def test_a_report_is_kept_unless_told(scene, capsys):
    arguments = ("--weights", str(scene / "model.pth"), "--dataset", "reclip_test_unlabelled", "--scenes", "1")
    output = run(scene, *arguments)
    before = (output / "bias.json").read_bytes()
    (output / "notes.png").write_bytes(b"the user's own")
    assert "contains a bias report: add --overwrite" in fails(scene, capsys, *arguments)
    assert (output / "bias.json").read_bytes() == before
    run(scene, *arguments, "--overwrite", "--scenes", "0")
    assert sorted(path.name for path in output.glob("*.png")) == [
        "notes.png",
        "preference_MaskCLIP.png",
        "preference_ReCLIP++.png",
    ]


def test_maskclip_alone(scene):
    output = run(scene, "--opts", "MODEL.META_ARCHITECTURE", "MaskCLIP")
    numbers, _ = assert_complete(output)
    assert [model["name"] for model in numbers["models"]] == ["MaskCLIP"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "ReCLIP++ has no checkpoint: give --weights"),
        (("--weights", "none.pth"), "checkpoint none.pth of ReCLIP++ does not exist"),
        (("--compare", "config.yaml"), "write NAME=config.yaml:weights.pth"),
        (("--compare", "a=none.yaml"), "config file none.yaml does not exist"),
        (("--dataset", "nowhere"), "data set 'nowhere' is not registered"),
        (("--weights", "model.pth", "--compare", "ReCLIP++=config.yaml:model.pth"), "two models are named 'ReCLIP++'"),
        (("--scenes", "-1"), "--scenes must be 0 or above"),
    ],
)
def test_errors_in_one_line_and_nothing_written(scene, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(scene)
    assert message in fails(scene, capsys, *arguments)
    assert not (scene / "out").exists()
