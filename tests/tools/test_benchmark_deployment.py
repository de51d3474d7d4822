"""``tools/benchmark_deployment.py``: ratios, scores and tables; and a whole run of a tiny student."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.config.files import configs_folder
from reclip_d2.data.images import read_image
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import CLASS_NAMES, datasets, isolated_cache, register_tiny_model, write_scenes  # noqa: F401
from tools import benchmark_deployment as tool

NAME = "reclip_test_benchmark_deployment"


@pytest.fixture
def records(tmp_path, datasets):  # noqa: F811
    """Two registered scenes with labels of four classes."""
    found = write_scenes(tmp_path / "val", 2)
    names = [synonyms[0] for synonyms in CLASS_NAMES]
    datasets(NAME, found, names, stuff_class_synonyms=CLASS_NAMES, stuff_colors=[[k, k, k] for k in range(4)])
    return found


def test_ratio_is_the_median_of_the_repetitions_ratios():
    # 2, 3 and 10: not the ratio of the medians, 6 / 2.
    assert tool.ratio({"a": [4.0, 6.0, 10.0], "b": [2.0, 2.0, 1.0]}, "a", "b") == 3


def test_each_form_runs_in_each_repetition():
    calls = []
    forms = {name: lambda image, name=name: calls.append((name, tuple(image.shape), image.dtype)) for name in "ab"}
    seconds = tool.latencies(forms, 24, 3, threads=1)
    assert calls == [("a", (1, 3, 24, 24), torch.uint8), ("b", (1, 3, 24, 24), torch.uint8)] * 5
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_scores_of_the_labels_themselves_and_of_others(records):
    """One form returns the labels as logits, one the first class; at twice the image's size, as after a resize."""
    images = {read_image(record["file_name"]).tobytes(): record["sem_seg_file_name"] for record in records}
    height, width = read_image(records[0]["file_name"]).shape[:2]

    def truth(image):
        # The image was doubled by nearest neighbours, so every second pixel is the original.
        original = image[0, :, ::2, ::2].permute(1, 2, 0).contiguous().numpy()
        labels = torch.from_numpy(np.asarray(Image.open(images[original.tobytes()])).astype(np.int64))
        labels = labels.clamp(max=3).repeat_interleave(2, 0).repeat_interleave(2, 1)
        return torch.nn.functional.one_hot(labels, 4).permute(2, 0, 1)[None].float()

    def first(image):
        return torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1).expand(1, 4, 2 * height, 2 * width)

    nearest = [T.ResizeTransform(height, width, 2 * height, 2 * width, interp=0)]
    forms = {tool.TORCH: truth, "first": first}
    result = tool.scores(forms, NAME, nearest)
    assert result[tool.TORCH] == {"mIoU": 100, "equal": 100}
    assert result["first"]["mIoU"] < 50 and result["first"]["equal"] < 100


def test_tables():
    seconds = {tool.ORT32: [0.010, 0.012], tool.ORT8: [0.005, 0.004]}
    scores = {"d": {tool.ORT32: {"mIoU": 50.0, "equal": 100.0}, tool.ORT8: {"mIoU": 49.5, "equal": 99.25}}}
    text = tool.Results({"cores": 2}, {"x": 2**20}, "parity", {96: seconds}, scores).text()
    assert "x 1.0 MiB" in text and "| student, onnxruntime | 11.0 |" in text
    assert "| student, onnxruntime INT8, against student, onnxruntime | 2.50 |" in text
    assert "| student, onnxruntime INT8 | 49.50 (99.25 %) |" in text
    assert "OpenVINO" not in text


@pytest.mark.slow
def test_a_whole_run(records, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
_BASE_: {configs_folder()}/Base-ReCLIP.yaml
MODEL:
  META_ARCHITECTURE: Distillation
  CLIP: {{NAME: {register_tiny_model(tmp_path)}, PRETRAINED: random, TEMPLATES: photo}}
  RESNETS: {{DEPTH: 18, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8}}
  BIAS_HEAD: {{PROMPT_LENGTH: 4}}
DATASETS: {{TRAIN: [{NAME}], TEST: []}}
INPUT: {{MIN_SIZE_TEST: 0, CROP: {{ENABLED: true, SIZE: [32, 40]}}}}
OUTPUT_DIR: {tmp_path}/output
"""
    )
    for architecture, file in (("Student", "student"), ("RectifiedCLIP", "teacher")):
        cfg = load_config(str(config), ["MODEL.META_ARCHITECTURE", architecture, "MODEL.DEVICE", "cpu"])
        check_registered_parts(cfg)
        ReclipCheckpointer(build_model(cfg).eval(), str(tmp_path)).save(file)
    images = tmp_path / "val"
    tool.main(
        ["--config-file", str(config), "--weights", str(tmp_path / "student.pth")]
        + ["--teacher", str(tmp_path / "teacher.pth"), "--calibrate", str(next(images.rglob("*.jpg")).parent)]
        + ["--datasets", NAME, "--sizes", "32", "48", "--repeats", "2", "--json", str(tmp_path / "results.json")]
    )
    written = json.loads((tmp_path / "results.json").read_text())
    forms = set(written["seconds"]["48"])
    assert {tool.RECTIFIED, tool.TORCH, tool.TORCHSCRIPT, tool.ORT32, tool.ORT8} <= forms
    assert (tool.OPENVINO8 in forms) == (importlib.util.find_spec("openvino") is not None)
    assert written["scores"][NAME][tool.ORT32]["equal"] > 99.9
    assert "INT8 on 2 calibration images" in capsys.readouterr().out
