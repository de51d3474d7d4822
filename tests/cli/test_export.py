"""``reclip export``: the trained models of a run, and those of ``train_net.py``, as files."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.config.files import configs_folder
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.images import read_image
from reclip_d2.export import onnx_file
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.workspace.stage_config import stage_config
from tests.cli.conftest import read_mask
from tests.helpers import CLASS_NAMES, config_files, datasets, register_tiny_model

__all__ = ["datasets"]
NAMES = [names[0] for names in CLASS_NAMES]


def run_onnx(path, pixels: np.ndarray) -> np.ndarray:
    """Output of the file for an image ``(H, W, 3)`` uint8, without its first axis."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])})[0][0]


def entry_of(path) -> dict:
    """The entry of a file in the ``classes.json`` next to it."""
    return json.loads((path.parent / "classes.json").read_text())["files"][path.name]


def test_the_file_gives_the_masks_of_the_run(reclip, model, photos, tmp_path):
    result = reclip("export", "--model", "out", "--format", "onnx", "--labels", "--output", "deployed")
    assert result.status == 0, result.err
    path = tmp_path / "deployed" / "rectified.onnx"
    assert result.out.count("\ncheck ") == 2 and "labels equal" in result.out
    assert f"file      {path.relative_to(tmp_path)}" in result.out
    # 96 x 96 is the size that the run's prediction gives the network.
    pixels = read_image(photos / "0.jpg")
    np.testing.assert_array_equal(run_onnx(path, pixels), read_mask(model / "masks" / "0.png"))
    entry = entry_of(path)
    assert entry["output"] == {"name": "labels", "type": "uint8", "shape": [1, "height", "width"]}
    assert entry["input"]["resize_short_side_to"] == 96
    # The same words are in the file.
    (metadata,) = onnx.load(path).metadata_props
    assert json.loads(metadata.value) == json.loads((tmp_path / "deployed" / "classes.json").read_text())


def test_refinements_are_left_out_with_a_word(reclip, model):
    call = ("export", "--model", "out", "--format", "torchscript", "--output")
    result = reclip(*call, "plain.pt")
    assert result.status == 0 and "left out" not in result.out
    result = reclip(*call, "refined.pt", "--opts", "TEST.REFINE", "['flip', 'pamr']")
    assert result.status == 0
    assert "left out  TEST.REFINE flip, pamr: files contain the network alone" in result.out


def test_background(reclip, model, tmp_path):
    # Two of the model's five classes are background names.
    call = ("export", "--model", "out", "--format", "onnx")
    assert reclip(*call, "--output", "logits.onnx").status == 0
    assert entry_of(tmp_path / "logits.onnx")["output"]["channels"] == [0, 1, 2, 255, 255]
    assert reclip(*call, "--output", "kept", "--background", "keep", "--labels").status == 0
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    best = run_onnx(tmp_path / "logits.onnx", pixels).argmax(0)
    labels = run_onnx(tmp_path / "kept" / "rectified.onnx", pixels)
    np.testing.assert_array_equal(labels, np.array([0, 1, 2, 3, 3])[best])
    content = json.loads((tmp_path / "kept" / "classes.json").read_text())
    assert [entry["name"] for entry in content["classes"]] == ["sky", "wood", "fire", "background"]


def test_what_is_there_is_kept(reclip, model, tmp_path):
    call = ("export", "--model", "out", "--format", "torchscript", "--size", "24x32")
    assert reclip(*call).status == 0
    path = model / "run" / "rectified" / "export" / "rectified.pt"
    before = path.read_bytes()
    assert f"{path} exists: give --overwrite" in reclip(*call).error
    assert path.read_bytes() == before
    assert reclip(*call, "--overwrite").status == 0
    assert entry_of(path)["input"]["shape"] == [1, 3, 24, 32]
    # One with other classes does not replace the one of existing masks.
    error = reclip(
        "export", "--model", "out", "--format", "onnx", "--background", "keep", "--output", "out/masks"
    ).error
    assert "classes.json has other classes" in error
    assert not list((model / "masks").glob("*.onnx"))


def test_a_student_that_was_kept(reclip, model, tmp_path):
    """A student with weights of its initialisation: its training is tested elsewhere."""
    folder = model / "run" / "student"
    folder.mkdir()
    cfg = stage_config("student", "reclip-embedded", ["MODEL.DEVICE", "cpu", "MODEL.CLIP.TEMPLATES", "photo"])
    (folder / "config.yaml").write_text(cfg.dump())
    recorded = json.loads((model / "reclip.json").read_text())
    assert recorded["kept"] == "rectified"
    (model / "reclip.json").write_text(json.dumps({**recorded, "kept": "student"}))
    state = recorded["classes"]
    classes = type("Classes", (), {"model_classes": [*state["classes"], *([name] for name in state["background"])]})
    register_images([], classes)
    cfg.MODEL.META_ARCHITECTURE = "Student"
    student = build_model(cfg).eval()
    ReclipCheckpointer(student, str(folder)).save("model_final")
    result = reclip("export", "--model", "out", "--format", "onnx")
    assert result.status == 0, result.err
    assert "distilled student" in result.out
    pixels = np.random.default_rng(0).integers(0, 256, (71, 50, 3), dtype=np.uint8)
    expected = student([{"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}])[0]["sem_seg"]
    logits = run_onnx(folder / "export" / "student.onnx", pixels)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-5)
    # The same in 8 bits, next to it.
    call = ("export", "--model", "out", "--format", "onnx", "--int8", "--calibrate", "photos")
    result = reclip(*call, "--calibration-images", 3, "--calibration", "percentile")
    assert result.status == 0, result.err
    assert "INT8      calibrated by percentile on 3 of 6 images" in result.out
    assert "check     INT8 on 3 calibration images: labels equal" in result.out
    path = folder / "export" / "student_int8.onnx"
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    np.testing.assert_allclose(run_onnx(path, pixels), expected.numpy(), atol=0.1)
    assert entry_of(path)["int8"] == {"calibration": "percentile", "calibration_images": 3, "weight_bits": 8}
    assert "int8" not in entry_of(folder / "export" / "student.onnx")
    assert path.stat().st_size < 0.5 * (folder / "export" / "student.onnx").stat().st_size
    # The others are there as well.
    for use in ("rectified", "maskclip"):
        assert reclip("export", "--model", "out", "--format", "torchscript", "--use", use).status == 0
        assert (model / "run" / use / "export" / f"{use}.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none"], "--model none is neither an output folder of reclip segment"),
        (["--model", "photos"], "--model photos is neither an output folder of reclip segment"),
        (["--model", "out", "--use", "student"], "no finished model (student)"),
        (["--model", "out", "--int8"], "--int8 needs --calibrate FOLDER"),
        (["--model", "out", "--calibrate", "photos"], "--calibrate is for --int8"),
        (["--model", "out", "--force"], "--force and --reduce-range are for --int8"),
        (["--model", "out", "--int8", "--calibrate", "photos"], "this model is ReCLIP++, rectified: train one with"),
        (["--model", "out", "--size", "12"], "--size 12: give height and width"),
        (["--model", "out", "--size", "0x12"], "--size 0x12: give height and width"),
        (["--model", "out", "--tolerance", "-1"], "tolerance -1.0: give a number above 0"),
        (["--model", "out", "--weights", "x.pth"], "--weights is for --config-file"),
        (["--model", "out", "--output", "x.pt"], "--output x.pt: files of the format onnx end in .onnx"),
        (["--model", "out", "--opts", "NO.KEY", "1"], "there is no key NO.KEY"),
        (["--model", "out", "--tolerance", "1e-12"], "does not compute what the model does, and was removed"),
        (["--config-file", "none.yaml"], "none.yaml does not exist"),
        (["--config-file", "none.yaml", "--use", "student"], "--use is for --model"),
    ],
)
def test_wrong_arguments(arguments, message, reclip, model, tmp_path):
    assert message in reclip("export", "--format", "onnx", *arguments).error
    assert not list(tmp_path.rglob("*.onnx"))


def test_packages_that_are_missing(reclip, model, monkeypatch):
    monkeypatch.setattr(onnx_file, "missing_packages", lambda: ["onnx", "onnxruntime"])
    error = reclip("export", "--model", "out", "--format", "onnx").error
    assert error == "error: onnx needs onnx and onnxruntime: pip install onnx onnxruntime"


@pytest.mark.parametrize(
    "arguments", [[], ["--format", "onnx"], ["--format", "onnx", "--model", "a", "--config-file", "b"]]
)
def test_usage_errors(arguments, reclip):
    result = reclip("export", *arguments)
    assert result.status == 2 and "usage: reclip export" in result.err


# ---- models of train_net.py --------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, datasets):
    """Config file of a student of the tiny CLIP, as it is trained."""
    datasets(
        "reclip_test_export", [], NAMES, stuff_class_synonyms=CLASS_NAMES, stuff_colors=[[k, k, k] for k in range(4)]
    )
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
_BASE_: {configs_folder()}/Base-ReCLIP.yaml
MODEL:
  META_ARCHITECTURE: Distillation
  DEVICE: cuda
  CLIP: {{NAME: {register_tiny_model(tmp_path)}, PRETRAINED: random, TEMPLATES: photo, AUTOCAST: bfloat16}}
  RESNETS: {{DEPTH: 18, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8}}
  BIAS_HEAD: {{PROMPT_LENGTH: 4}}
DATASETS: {{TRAIN: [reclip_test_export], TEST: []}}
INPUT: {{MIN_SIZE_TEST: 0, CROP: {{ENABLED: true, SIZE: [32, 40]}}}}
TEST: {{SLIDING_WINDOW: {{ENABLED: true}}}}
OUTPUT_DIR: {tmp_path}/output
"""
    )
    return path


@pytest.mark.parametrize("architecture", ["Student", "RectifiedCLIP"])
def test_a_model_of_train_net(architecture, reclip, config, tmp_path):
    plain = ["MODEL.DEVICE", "cpu", "MODEL.CLIP.AUTOCAST", "float32"]
    cfg = load_config(str(config), ["MODEL.META_ARCHITECTURE", architecture, *plain])
    check_registered_parts(cfg)
    model = build_model(cfg).eval()
    ReclipCheckpointer(model, str(tmp_path)).save("model")
    opts = [] if architecture == "Student" else ["--opts", "MODEL.META_ARCHITECTURE", architecture]
    call = ("export", "--config-file", config, "--weights", "model.pth", "--format", "onnx", *opts)
    result = reclip(*call)
    assert result.status == 0, result.err
    path = tmp_path / "export" / ("student.onnx" if architecture == "Student" else "rectified.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    expected = model([{"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}])[0]["sem_seg"]
    np.testing.assert_allclose(run_onnx(path, pixels), expected.numpy(), rtol=1e-4, atol=1e-5)
    content = json.loads((path.parent / "classes.json").read_text())
    assert content["classes"][2] == {"id": 2, "name": "water", "color": [2, 2, 2]}
    assert entry_of(path)["input"]["resize_short_side_to"] is None


def test_maskclip_needs_no_weights(reclip, config, tmp_path):
    result = reclip(
        "export", "--config-file", config, "--format", "torchscript", "--opts", "MODEL.META_ARCHITECTURE", "MaskCLIP"
    )
    assert result.status == 0, result.err
    assert (tmp_path / "output" / "export" / "maskclip.pt").exists()


def test_own_classes_of_a_config(reclip, photos, classes, tmp_path):
    config = tmp_path / "config.yaml"
    files = ", ".join(config_files("custom-reclip-embedded", "maskclip"))
    config.write_text(f"_BASE_: [{files}]\nOUTPUT_DIR: {tmp_path}/output\n")
    keys = ("MODEL.CLIP.TEMPLATES", "photo", "DATASETS.CUSTOM.CLASSES", classes, "DATASETS.CUSTOM.IMAGES", photos)
    result = reclip("export", "--config-file", config, "--format", "onnx", "--labels", "--opts", *keys)
    assert result.status == 0, result.err
    labels = run_onnx(tmp_path / "output" / "export" / "maskclip.onnx", np.asarray(Image.open(photos / "3.jpg")))
    assert labels.shape == (200, 150) and set(np.unique(labels)) <= {0, 1, 2, 255}


def test_weights_that_are_missing(reclip, config):
    call = ("export", "--config-file", config, "--format", "torchscript")
    assert "error: --weights is missing: name the checkpoint" in reclip(*call).error
    assert "--weights none.pth: there is no such file" in reclip(*call, "--weights", "none.pth").error
    assert "'Nothing' is not registered" in reclip(*call, "--opts", "MODEL.META_ARCHITECTURE", "Nothing").error
