"""The configs of the data sets: Table 12 of ReCLIP's supplement, iterations from epochs, sizes of resized images."""

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import build_test_augmentations, build_train_augmentations
from reclip_d2.modeling import Student
from tests.helpers import CONFIGS, config_files

# Epochs, training images, batch, crop, t.
RECIPES = {
    "voc20": (200, 1464, 12, 520, 0.07),
    "context59": (400, 4998, 12, 480, 0.0),
    "ade150": (300, 20210, 8, 512, 0.0),
    "cityscapes19": (200, 2975, 8, 512, 0.07),
    "coco_stuff27": (20, 118287, 8, 512, 0.0),
}
DISTILLATION_EPOCHS = {"voc20": 100, "context59": 50, "ade150": 20, "cityscapes19": 100, "coco_stuff27": 3}
# Of whole images, for ReCLIP.
IMAGE_THRESHOLDS = {"voc20": 0.23, "context59": 0.2, "ade150": 0.21, "cityscapes19": 0.215, "coco_stuff27": 0.2}


def leaves(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    """Values by their full key."""
    values = {}
    for key, value in cfg.items():
        values |= leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    epochs, images, batch, crop, threshold = RECIPES[name]
    cfg = load_config(config_files(name, "reclippp_rectify"))
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
    text = (CONFIGS / "datasets" / f"{name}.yaml").read_text()
    assert f"{epochs} epochs x {images:,} images / {batch} images a batch = " in text


@pytest.mark.parametrize("name", RECIPES)
def test_reclip_differs_from_reclippp_in_the_model_and_the_hypotheses_only(name):
    cfg = load_config(config_files(name, "reclip_rectify"))
    assert cfg.MODEL.META_ARCHITECTURE == "RectifiedCLIP" and cfg.MODEL.BIAS_HEAD.NAME == "ReCLIPBiasHead"
    assert cfg.MODEL.MASK_DECODER.ENABLED is False
    assert (cfg.HYPOTHESIS.METHOD, cfg.HYPOTHESIS.THRESHOLD) == ("image", IMAGE_THRESHOLDS[name])
    assert cfg.OUTPUT_DIR == f"output/{name}/reclip_rectify"
    plus = load_config(config_files(name, "reclippp_rectify"))
    differ = {key for key, value in leaves(cfg).items() if leaves(plus)[key] != value}
    assert differ == {
        "MODEL.BIAS_HEAD.NAME",
        "MODEL.BIAS_HEAD.REFERENCE_NORM",
        "MODEL.MASK_DECODER.ENABLED",
        "MODEL.GUMBEL.TAU",
        "HYPOTHESIS.METHOD",
        "HYPOTHESIS.THRESHOLD",
        "OUTPUT_DIR",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_maskclip(name):
    cfg = load_config(config_files(name, "maskclip"))
    assert cfg.MODEL.META_ARCHITECTURE == "MaskCLIP" and cfg.DATASETS.TEST == (f"{name}_val",)


# ---- distillation -----------------------------------------------------------------------------------------------

STUDENT_KEYS = {
    "MODEL.META_ARCHITECTURE",
    "MODEL.STUDENT.WEIGHTS",
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "OUTPUT_DIR",
}


def changes(config: CfgNode, base: CfgNode) -> set[str]:
    return {key for key, value in leaves(config).items() if leaves(base)[key] != value}


@pytest.mark.parametrize("model", ["reclippp", "reclip"])
@pytest.mark.parametrize("name", RECIPES)
def test_distillation_has_its_teachers_keys(name, model):
    cfg = load_config(config_files(name, f"{model}_distill"))
    teacher = load_config(config_files(name, f"{model}_rectify"))
    assert changes(cfg, teacher) == STUDENT_KEYS | {"MODEL.TEACHER.WEIGHTS"}
    assert cfg.MODEL.META_ARCHITECTURE == "Distillation"
    assert cfg.MODEL.TEACHER.META_ARCHITECTURE == "RectifiedCLIP"
    assert cfg.MODEL.TEACHER.WEIGHTS == f"{teacher.OUTPUT_DIR}/model_final.pth"
    assert cfg.OUTPUT_DIR == f"output/{name}/{model}_distill"
    weights = cfg.MODEL.DISTILLATION
    assert (weights.MASK_WEIGHT, weights.FEATURE_WEIGHT, weights.TEXT_WEIGHT) == (1.0, 0.5, 0.5)
    assert (weights.FEATURE_SIZE, cfg.MODEL.STUDENT.HEAD) == ("image", "query_bias_decoder")


@pytest.mark.parametrize("name", RECIPES)
def test_maskclip_plus(name):
    cfg = load_config(config_files(name, "maskclip_plus"))
    different = changes(cfg, load_config(config_files(name, "maskclip")))
    # Detectron2's own CHECKPOINT_PERIOD may happen to be ours.
    assert different | {"SOLVER.CHECKPOINT_PERIOD"} == STUDENT_KEYS | {
        "MODEL.TEACHER.META_ARCHITECTURE",
        "MODEL.STUDENT.HEAD",
        "MODEL.DISTILLATION.FEATURE_WEIGHT",
        "MODEL.DISTILLATION.TEXT_WEIGHT",
    }
    assert (cfg.MODEL.TEACHER.META_ARCHITECTURE, cfg.MODEL.TEACHER.WEIGHTS) == ("MaskCLIP", "")
    assert cfg.MODEL.STUDENT.HEAD == "query"
    assert (cfg.MODEL.DISTILLATION.FEATURE_WEIGHT, cfg.MODEL.DISTILLATION.TEXT_WEIGHT) == (0.0, 0.0)
    assert cfg.MODEL.MASKCLIP.PROMPT_DENOISING == cfg.MODEL.MASKCLIP.KEY_SMOOTHING == 0.0
    assert cfg.OUTPUT_DIR == f"output/{name}/maskclip_plus"


@pytest.mark.parametrize("kind", ["reclippp_distill", "reclip_distill", "maskclip_plus"])
@pytest.mark.parametrize("name", RECIPES)
def test_all_students_are_one_network_trained_for_as_long(name, kind):
    _, images, batch, *_ = RECIPES[name]
    cfg = load_config(config_files(name, kind))
    epochs = DISTILLATION_EPOCHS[name]
    assert cfg.SOLVER.IMS_PER_BATCH == batch and abs(cfg.SOLVER.MAX_ITER * batch - epochs * images) < batch
    assert (
        f"{epochs} epochs x {images:,} images / {batch} images a batch = "
        in (CONFIGS / "datasets" / f"{name}.yaml").read_text()
    )
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (
        "SGD",
        0.01,
        0.9,
        5e-4,
    )
    assert cfg.MODEL.STUDENT.WEIGHTS == "torchvision://resnet101/IMAGENET1K_V1"
    with torch.device("meta"):  # the network alone, of no numbers
        student = Student(cfg)
    assert len(student.backbone.res4) == 23 and student.size_divisibility == 8
    assert student.feature_head.branches[0].weight.shape == (512, 2048, 3, 3)
    crop = -(-cfg.INPUT.CROP.SIZE[0] // 16)
    classes = int("".join(filter(str.isdigit, name)))
    assert student.num_classes == classes
    bias, decoder = student.inherited.bias_map, student.inherited.mask_decoder
    assert (bias is None) == (kind == "maskclip_plus") and (decoder is None) == (kind != "reclippp_distill")
    assert bias is None or bias.shape == (classes, crop, crop)


def test_students_of_the_embedded_data_set_differ_in_their_teachers_only():
    kinds = ("reclippp_distill", "reclip_distill", "maskclip_plus")
    plus, reclip, maskclip = (load_config(config_files("embedded", kind)) for kind in kinds)
    rectified = load_config(config_files("embedded", "reclippp_rectify"))
    own = load_config(config_files("embedded", "reclip_rectify"))
    assert changes(reclip, plus) == changes(own, rectified) | {"MODEL.TEACHER.WEIGHTS"}
    for cfg in (plus, reclip, maskclip):
        assert cfg.MODEL.META_ARCHITECTURE == "Distillation"
        for node in ("RESNETS", "BACKBONE"):
            assert leaves(cfg.MODEL[node]) == leaves(plus.MODEL[node])
        assert leaves(cfg.SOLVER) == leaves(plus.SOLVER)
    assert changes(maskclip, plus) >= {"MODEL.TEACHER.META_ARCHITECTURE", "MODEL.STUDENT.HEAD"}
    assert plus.MODEL.TEACHER.WEIGHTS == f"{rectified.OUTPUT_DIR}/model_final.pth"
    assert reclip.MODEL.TEACHER.WEIGHTS == f"{own.OUTPUT_DIR}/model_final.pth"


@pytest.mark.parametrize("name", RECIPES)
def test_scaling_to_four_gpus(name):
    cfg = load_config(config_files(name, "reclippp_rectify"))
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
    cfg = load_config(config_files(name, "reclippp_rectify"))
    inputs = T.AugInput(np.zeros((*size, 3), np.uint8))
    T.AugmentationList(build_test_augmentations(cfg))(inputs)
    assert inputs.image.shape[:2] == resized
    inputs = T.AugInput(np.zeros((*size, 3), np.uint8))
    T.AugmentationList(build_train_augmentations(cfg))(inputs)
    assert inputs.image.shape[:2] == cropped
