"""The demo program: pictures of predictions by Detectron2's Visualizer, with tiny models."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.datasets.custom import CUSTOM
from reclip_d2.engine import trainer
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import datasets, isolated_cache, tiny_config

__all__ = ["datasets", "isolated_cache"]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["sky", "tall tree", "water", "brick wall"]
COLORS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]

spec = importlib.util.spec_from_file_location("demo_program", ROOT / "demo" / "demo.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


@pytest.fixture
def scene(tmp_path, datasets, monkeypatch) -> Path:
    """A folder with images, a config of MaskCLIP and a checkpoint of a student; it is the current one."""
    datasets("reclip_test_demo", [], NAMES, stuff_colors=COLORS)
    (tmp_path / "photos" / "in").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (48, 64)), ("in/b.png", (33, 57))):
        blocks = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST).save(tmp_path / "photos" / name)
    (tmp_path / "config.yaml").write_text(
        f"""
{tiny_config(tmp_path, "MaskCLIP")}
  RESNETS: {{DEPTH: 18, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8}}
DATASETS: {{TRAIN: [], TEST: [reclip_test_demo]}}
INPUT: {{MIN_SIZE_TEST: 32, CROP: {{ENABLED: true, SIZE: [32, 40]}}}}
OUTPUT_DIR: {tmp_path}/run
"""
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> None:
    program.main(["--config-file", "config.yaml", *map(str, arguments)])


def error(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 1
    return capsys.readouterr().err


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_without_opencv(scene, monkeypatch, capsys):
    """Detectron2 does not install it: the program reports it, and its module can still be imported."""
    monkeypatch.delitem(sys.modules, "detectron2.utils.visualizer", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert error(capsys, "--input", "photos", "--output", "pictures") == (
        "error: OpenCV is not installed, and Detectron2's Visualizer needs it: pip install opencv-python-headless\n"
    )
    assert not (scene / "pictures").exists()


def test_pictures_of_a_folder(scene, capsys):
    run("--input", "photos", "--output", "pictures")
    assert pixels_of(scene / "pictures" / "a.png").shape == (48, 64, 3)
    assert pixels_of(scene / "pictures" / "in" / "b.png").shape == (33, 57, 3)
    assert sorted(path.name for path in (scene / "pictures").rglob("*.*")) == ["a.png", "b.png"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "photos/a.jpg: " in lines[0] and lines[0].endswith("-> pictures/a.png")
    assert any(name in lines[0] for name in NAMES)


def test_colours_and_names_are_the_data_sets(scene):
    image = np.full((60, 80, 3), 100, np.uint8)
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:] = 2
    labels[:6] = 255  # ignored: the image as it is
    program.draw(image, labels, MetadataCatalog.get("reclip_test_demo"), scene / "x.png")
    picture = pixels_of(scene / "x.png")
    assert picture.shape == (60, 80, 3)
    # 0.8 of the class's colour and 0.2 of the image, away from edges and names.
    np.testing.assert_allclose(picture[55, 5], [0.8 * 255 + 20, 20, 20], atol=2)
    np.testing.assert_allclose(picture[55, 75], [20, 20, 0.8 * 255 + 20], atol=2)
    np.testing.assert_allclose(picture[2, 10], 100, atol=2)
    # The picture shows the names: without them it differs.
    unnamed = MetadataCatalog.get("reclip_test_demo_unnamed").set(stuff_classes=["", "", ""], stuff_colors=COLORS)
    program.draw(image, labels, unnamed, scene / "y.png")
    assert (pixels_of(scene / "y.png") != picture).any()
    MetadataCatalog.remove("reclip_test_demo_unnamed")


def test_one_file(scene):
    run("--input", "photos/a.jpg", "--output", "new/one.jpg")
    assert Image.open(scene / "new" / "one.jpg").format == "JPEG"
    assert pixels_of(scene / "new" / "one.jpg").shape == (48, 64, 3)


def test_without_output(scene, capsys):
    run("--input", "photos/a.jpg")
    assert (scene / "run" / "demo" / "a.png").exists()
    assert f"no --output: the pictures go to {scene}/run/demo" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["RectifiedCLIP", "Distillation"])
def test_trained_models(architecture, scene):
    keys = ("MODEL.META_ARCHITECTURE", architecture)
    built = "Student" if architecture == "Distillation" else architecture
    cfg = load_config("config.yaml", ["MODEL.META_ARCHITECTURE", built])
    torch.manual_seed(0)
    model = trainer.Trainer.build_model(cfg)
    ReclipCheckpointer(model, str(scene)).save("model")
    seen = {}
    draw = program.draw

    def spy(image, labels, *rest):
        seen["image"], seen["labels"] = image, labels
        draw(image, labels, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "draw", spy)
        run("--input", "photos/a.jpg", "--output", "pictures", "--opts", *keys, "MODEL.WEIGHTS", "model.pth")
    assert (scene / "pictures" / "a.png").exists()
    # The labels are the model's, at the image's size.
    resized = np.asarray(Image.fromarray(seen["image"]).resize((43, 32), Image.Resampling.BILINEAR))
    record = {"image": torch.from_numpy(resized.transpose(2, 0, 1).copy()), "height": 48, "width": 64}
    np.testing.assert_array_equal(seen["labels"], model.eval()([record])[0]["sem_seg"].argmax(0).numpy())


def test_own_classes(scene):
    (scene / "classes.txt").write_text("red thing\nblue thing, azure\n")
    (scene / "config.yaml").write_text(
        (scene / "config.yaml").read_text().replace("[reclip_test_demo]", "[custom], CUSTOM: {CLASSES: classes.txt}")
    )
    run("--input", "photos", "--output", "pictures")
    assert len(list((scene / "pictures").rglob("*.png"))) == 2
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(CUSTOM)


def test_pictures_that_are_there(scene, capsys):
    run("--input", "photos", "--output", "pictures")
    before = (scene / "pictures" / "a.png").read_bytes()
    (scene / "pictures" / "in" / "b.png").write_bytes(b"x")
    assert "pictures/a.png exists: give --overwrite" in error(capsys, "--input", "photos", "--output", "pictures")
    run("--input", "photos", "--output", "pictures", "--overwrite")
    assert (scene / "pictures" / "a.png").read_bytes() == before
    assert pixels_of(scene / "pictures" / "in" / "b.png").shape == (33, 57, 3)


def test_wrong_input(scene, capsys):
    assert "is one file, but there are 2 images" in error(capsys, "--input", "photos", "--output", "a.png")
    (scene / "note").write_text("")
    assert "is neither a picture" in error(capsys, "--input", "photos", "--output", "note")
    assert "IMAGES nothing does not exist" in error(capsys, "--input", "nothing", "--output", "x")
    keys = ("--opts", "MODEL.META_ARCHITECTURE", "RectifiedCLIP")
    assert "set MODEL.WEIGHTS to a checkpoint" in error(capsys, "--input", "photos", "--output", "x", *keys)
    assert not (scene / "x").exists()


def test_a_broken_image_does_not_stop_the_others(scene, capsys):
    (scene / "photos" / "0.jpg").write_bytes(b"broken")
    message = error(capsys, "--input", "photos", "--output", "pictures")
    assert message == "error: 1 of 3 images cannot be read (listed above)\n"
    assert len(list((scene / "pictures").rglob("*.png"))) == 2
