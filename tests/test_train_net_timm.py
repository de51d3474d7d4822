"""``train_net.py`` with image towers of timm and random weights, on pictures of an embedded world: from hypotheses to a
checkpoint and a number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.engine import program
from reclip_d2.toy import EMBEDDED_CLASSES
from reclip_d2.toy.scenes import render_scene
from tests.helpers import CONFIGS, datasets, isolated_cache
from tests.timm_models import architecture_file

__all__ = ["datasets", "isolated_cache"]


def write_world(root: Path, count: int, seed: int) -> list[dict]:
    """Pictures of the embedded world, with their records."""
    folders = [root / "images", root / "annotations_detectron2"]
    records = []
    for folder in folders:
        folder.mkdir(parents=True)
    for index in range(count):
        scene = render_scene(seed, index)
        image, label = (folder / f"{index}.png" for folder in folders)
        Image.fromarray(scene.image).save(image)
        Image.fromarray(scene.labels.astype(np.uint8)).save(label)
        height, width = scene.labels.shape
        records.append(
            {"file_name": str(image), "sem_seg_file_name": str(label), "image_id": str(index), "height": height,
             "width": width}
        )  # fmt: skip
    return records


@pytest.mark.parametrize(
    ("name", "attention"), [("small_siglip", "value"), ("small_eva02", "naclip"), ("small_rotary", "value")]
)
def test_training_and_evaluation(name, attention, tmp_path, datasets, isolated_cache):
    datasets("reclip_test_train", write_world(tmp_path / "train", 4, seed=1), EMBEDDED_CLASSES)
    datasets("reclip_test_val", write_world(tmp_path / "val", 2, seed=2), EMBEDDED_CLASSES)
    (tmp_path / "config.yaml").write_text(
        f"""_BASE_: {CONFIGS}/Base-ReCLIP.yaml
MODEL:
  META_ARCHITECTURE: RectifiedCLIP
  DEVICE: cpu
  CLIP:
    NAME: {architecture_file(name, tmp_path)}
    PRETRAINED: random
    TEMPLATES: photo
    DENSE_ATTENTION: {attention}
  BIAS_HEAD: {{PROMPT_LENGTH: 4}}
HYPOTHESIS: {{WINDOW_RATIO: 0.5, THRESHOLD: 0.05}}
DATASETS: {{TRAIN: [reclip_test_train], TEST: [reclip_test_val]}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96, CROP: {{ENABLED: true, SIZE: [64, 80]}}}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 3, BASE_LR: 0.05}}
OUTPUT_DIR: {tmp_path / "out"}
"""
    )
    arguments = ["--config-file", str(tmp_path / "config.yaml")]
    program.main(program.argument_parser().parse_args(arguments))
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert all(key.startswith(("bias_head.", "mask_decoder.")) for key in state)
    assert all(torch.isfinite(value).all() for value in state.values())
    weights = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    (score,) = [metrics["sem_seg/mIoU"] for metrics in map(json.loads, lines) if "sem_seg/mIoU" in metrics]
    again = program.main(program.argument_parser().parse_args([*arguments, *weights]))
    assert 0 <= score <= 100 and again["sem_seg"]["mIoU"] == pytest.approx(score)
