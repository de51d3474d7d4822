"""Check a config: each value by its key's rule, and rules across keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from reclip_d2.config.keys import RULES
from reclip_d2.config.rules import problem_of
from reclip_d2.errors import ReclipError

_MISSING = object()


def check_config(cfg: CfgNode) -> None:
    """Raise :class:`ReclipError` for an invalid value, or for keys that contradict each other."""
    for key, rule in RULES.items():
        value = value_at(cfg, key)
        if value is not _MISSING and (problem := problem_of(rule, value)):
            raise ReclipError(f"{key} {problem}")
    for holds, message in _relations(cfg):
        if not holds:
            raise ReclipError(message)


def value_at(cfg: CfgNode, key: str) -> Any:  # noqa: ANN401
    """Value of ``A.B.C``; ``_MISSING`` if this version of Detectron2 does not have the key."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _relations(cfg: CfgNode) -> Iterator[tuple[object, str]]:
    """Rules across keys: whether each holds, and the message if not. Each value is valid by itself."""
    yield from _model_relations(cfg)
    yield from _hypothesis_relations(cfg)
    yield from _input_relations(cfg)
    yield from _solver_relations(cfg)


def _model_relations(cfg: CfgNode) -> Iterator[tuple[object, str]]:
    model, student = cfg.MODEL, cfg.MODEL.STUDENT
    yield (
        any(model.LOSS[f"{name}_WEIGHT"] for name in ("CONTRASTIVE", "COVERAGE", "OUTSIDE", "ANCHOR")),
        "all weights of MODEL.LOSS are 0, so nothing would train: set one",
    )
    yield (
        any(model.DISTILLATION[f"{name}_WEIGHT"] for name in ("MASK", "FEATURE", "TEXT")),
        "all weights of MODEL.DISTILLATION are 0, so nothing would train: set one",
    )
    yield (
        "/MSRA/" not in student.WEIGHTS
        or (student.FORMAT == "BGR" and model.RESNETS.STRIDE_IN_1X1 and max(student.PIXEL_STD) == 1),
        "MODEL.STUDENT.WEIGHTS of MSRA need MODEL.RESNETS.STRIDE_IN_1X1 True, MODEL.STUDENT.FORMAT BGR,"
        " PIXEL_MEAN [103.53, 116.28, 123.675] and PIXEL_STD [1, 1, 1]",
    )
    architectures = (model.META_ARCHITECTURE, model.TEACHER.META_ARCHITECTURE)
    maskclip = architectures[0] == "MaskCLIP" or architectures in (
        ("Distillation", "MaskCLIP"),
        ("Distillation", "MaskFolder"),
    )
    yield (
        model.META_ARCHITECTURE != "MaskFolder",
        "MODEL.META_ARCHITECTURE MaskFolder is a teacher: set MODEL.META_ARCHITECTURE Distillation and"
        " MODEL.TEACHER.META_ARCHITECTURE MaskFolder",
    )
    yield (
        architectures != ("Distillation", "MaskFolder") or model.TEACHER.MASKS.FOLDER,
        "MODEL.TEACHER.META_ARCHITECTURE MaskFolder needs MODEL.TEACHER.MASKS.FOLDER: set it to a folder of masks",
    )
    for key in ("LEARNABLE_QUERY", "FINE_TUNE"):
        yield (
            not (maskclip and model.CLIP[key]),
            f"MODEL.CLIP.{key} is for RectifiedCLIP; MaskCLIP has nothing to train: set it to False",
        )
    yield (
        not (model.CLIP.FINE_TUNE and model.CLIP.AUTOCAST == "float16"),
        "MODEL.CLIP.FINE_TUNE does not work with MODEL.CLIP.AUTOCAST float16: set float32 or bfloat16, or use"
        " SOLVER.AMP, which scales gradients",
    )


def _hypothesis_relations(cfg: CfgNode) -> Iterator[tuple[object, str]]:
    keys = cfg.HYPOTHESIS
    yield (
        not keys.CROP_AWARE or keys.METHOD in ("crops", "one_pass"),
        "HYPOTHESIS.CROP_AWARE needs HYPOTHESIS.METHOD crops or one_pass: other methods have no windows",
    )
    yield (
        keys.METHOD != "imported" or keys.FILE,
        "HYPOTHESIS.METHOD imported needs HYPOTHESIS.FILE: make it with tools/import_public_hypotheses.py",
    )
    yield (
        keys.METHOD != "imported" or not keys.CLASSES_PER_IMAGE,
        "HYPOTHESIS.CLASSES_PER_IMAGE is not for HYPOTHESIS.METHOD imported, which has no threshold: set it to 0",
    )


def _input_relations(cfg: CfgNode) -> Iterator[tuple[object, str]]:
    keys, window = cfg.INPUT, cfg.TEST.SLIDING_WINDOW
    crop = keys.CROP
    relative = crop.TYPE.startswith("relative")
    fits = all(0 < side <= 1 if relative else isinstance(side, int) and side >= 1 for side in crop.SIZE)
    kind = "fractions of the image, above 0 and at most 1" if relative else "whole numbers of pixels"
    yield fits, f"INPUT.CROP.SIZE is {list(crop.SIZE)}; with INPUT.CROP.TYPE {crop.TYPE} it must be two {kind}"
    yield (
        len(keys.GEO.BANDS) != 2,
        f"INPUT.GEO.BANDS is {list(keys.GEO.BANDS)}; name three bands (red, green, blue), or one for grey",
    )
    low, high = keys.GEO.PERCENTILES
    yield low < high, f"INPUT.GEO.PERCENTILES is {[low, high]}; the first must be below the second"
    yield (
        keys.MIN_SIZE_TRAIN_SAMPLING != "range"
        or (len(keys.MIN_SIZE_TRAIN) == 2 and keys.MIN_SIZE_TRAIN[0] <= keys.MIN_SIZE_TRAIN[1]),
        f"INPUT.MIN_SIZE_TRAIN is {tuple(keys.MIN_SIZE_TRAIN)}; with INPUT.MIN_SIZE_TRAIN_SAMPLING range it must be the"
        " smallest and the largest size",
    )
    yield (
        all(step <= size for size, step in zip(window.SIZE, window.STRIDE, strict=True)),
        "TEST.SLIDING_WINDOW.STRIDE must not exceed TEST.SLIDING_WINDOW.SIZE, or windows would leave gaps",
    )


def _solver_relations(cfg: CfgNode) -> Iterator[tuple[object, str]]:
    keys = cfg.SOLVER
    batch, world = keys.IMS_PER_BATCH, keys.REFERENCE_WORLD_SIZE
    yield (
        keys.ACCUMULATE_STEPS <= batch,
        f"SOLVER.ACCUMULATE_STEPS {keys.ACCUMULATE_STEPS} is more than the {batch} images of SOLVER.IMS_PER_BATCH:"
        " lower it, or raise SOLVER.IMS_PER_BATCH",
    )
    yield (
        world == 0 or batch % world == 0,
        f"SOLVER.IMS_PER_BATCH {batch} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE {world}",
    )
    yield (
        keys.JUDGE_PERIOD == 0 or (cfg.FEATURE_STORE.VIEWS > 0 and cfg.FEATURE_STORE.KIND == "whole"),
        "SOLVER.JUDGE_PERIOD needs a feature store of whole images: set FEATURE_STORE.VIEWS 2 and FEATURE_STORE.KIND"
        " whole, or SOLVER.JUDGE_PERIOD 0",
    )
    steps = list(keys.STEPS)
    yield steps == sorted(set(steps)), f"SOLVER.STEPS is {tuple(steps)}; steps must be in ascending order"
    yield (
        not keys.NESTEROV or keys.MOMENTUM > 0,
        "SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0",
    )
    yield (
        keys.LR_SCHEDULER_NAME != "WarmupStepWithFixedGammaLR" or "NUM_DECAYS" in keys,
        "SOLVER.LR_SCHEDULER_NAME WarmupStepWithFixedGammaLR needs a newer Detectron2: use WarmupPolyLR",
    )
