"""The configs of the data sets: Table 12 of ReCLIP's supplement, iterations from epochs, sizes of resized images."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import build_test_augmentations, build_train_augmentations

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# Epochs, training images, batch, crop, t.
RECIPES = {
    "voc20": (200, 1464, 12, 520, 0.07),
    "context59": (400, 4998, 12, 480, 0.0),
    "ade150": (300, 20210, 8, 512, 0.0),
    "cityscapes19": (200, 2975, 8, 512, 0.07),
    "coco_stuff27": (20, 118287, 8, 512, 0.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    epochs, images, batch, crop, threshold = RECIPES[name]
    cfg = load_config(str(CONFIGS / name / "reclippp_rectify.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "RectifiedCLIP"
    assert cfg.SOLVER.IMS_PER_BATCH == batch
    assert abs(cfg.SOLVER.MAX_ITER * batch - epochs * images) < batch
    assert cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute" and list(cfg.INPUT.CROP.SIZE) == [crop, crop]
    assert cfg.HYPOTHESIS.THRESHOLD == threshold
    assert cfg.HYPOTHESIS.WINDOW_RATIO == pytest.approx(1 / 6)
    assert cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH == 73
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.01, 0.9, 5e-4)
    assert cfg.DATASETS.TRAIN == (f"{name}_train",) and cfg.DATASETS.TEST == (f"{name}_val",)
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    assert cfg.OUTPUT_DIR == f"output/{name}/reclippp_rectify"


@pytest.mark.parametrize("name", RECIPES)
def test_iterations_are_computed_in_the_file(name):
    epochs, images, batch, *_ = RECIPES[name]
    text = (CONFIGS / name / "reclippp_rectify.yaml").read_text()
    assert f"{epochs} epochs x {images:,} images / {batch} images a batch = " in text


@pytest.mark.parametrize("name", RECIPES)
def test_maskclip(name):
    cfg = load_config(str(CONFIGS / name / "maskclip.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "MaskCLIP" and cfg.DATASETS.TEST == (f"{name}_val",)


@pytest.mark.parametrize("name", RECIPES)
def test_scaling_to_four_gpus(name):
    cfg = load_config(str(CONFIGS / name / "reclippp_rectify.yaml"))
    scaled = DefaultTrainer.auto_scale_workers(cfg, 4)
    assert scaled.SOLVER.IMS_PER_BATCH == 4 * cfg.SOLVER.IMS_PER_BATCH
    assert scaled.SOLVER.BASE_LR == pytest.approx(0.04)
    assert abs(scaled.SOLVER.MAX_ITER - cfg.SOLVER.MAX_ITER / 4) <= 0.5


@pytest.mark.parametrize(
    ("name", "size", "resized", "cropped"),
    [
        ("voc20", (375, 500), (512, 683), (512, 520)),  # short side 512
        ("voc20", (100, 500), (410, 2048), (410, 520)),  # long side at most 2048
        ("context59", (375, 500), (390, 520), (390, 480)),  # long side 520
        ("context59", (500, 333), (520, 346), (480, 346)),
        ("ade150", (600, 300), (1024, 512), (512, 512)),
        ("cityscapes19", (1024, 2048), (512, 1024), (512, 512)),
        ("coco_stuff27", (480, 640), (512, 683), (512, 512)),
    ],
)
def test_scale_and_crop(name, size, resized, cropped):
    cfg = load_config(str(CONFIGS / name / "reclippp_rectify.yaml"))
    inputs = T.AugInput(np.zeros((*size, 3), np.uint8))
    T.AugmentationList(build_test_augmentations(cfg))(inputs)
    assert inputs.image.shape[:2] == resized
    inputs = T.AugInput(np.zeros((*size, 3), np.uint8))
    T.AugmentationList(build_train_augmentations(cfg))(inputs)
    assert inputs.image.shape[:2] == cropped
