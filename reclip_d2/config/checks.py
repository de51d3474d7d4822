"""Rules that the values of the keys obey."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from reclip_d2.config.keys import CHOICES
from reclip_d2.errors import ReclipError


def check_config(cfg: CfgNode) -> None:
    """Raise :class:`ReclipError` for a value that no key of ours takes."""
    for key, choices in CHOICES.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        if node not in choices:
            raise ReclipError(f"{key} is {node!r}; choose one of {', '.join(map(str, choices))}")
    kernel, mean_filter = cfg.MODEL.MASK_DECODER.KERNEL_SIZE, cfg.MODEL.MASKCLIP.MEAN_FILTER
    losses = [cfg.MODEL.LOSS[f"{name}_WEIGHT"] for name in ("CONTRASTIVE", "COVERAGE", "OUTSIDE")]
    student, window = cfg.MODEL.STUDENT, cfg.TEST.SLIDING_WINDOW
    architectures = (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TEACHER.META_ARCHITECTURE)
    maskclip = architectures[0] == "MaskCLIP" or architectures == ("Distillation", "MaskCLIP")
    steps_fit = len(window.SIZE) == len(window.STRIDE) == 2 and all(
        0 < step <= size for size, step in zip(window.SIZE, window.STRIDE, strict=True)
    )
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ReclipError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; take cpu, cuda or cuda:1") from error
    rules = (
        (kernel > 0 and kernel % 2 == 1, "MODEL.MASK_DECODER.KERNEL_SIZE must be odd"),
        (mean_filter == 0 or (mean_filter > 0 and mean_filter % 2 == 1), "MODEL.MASKCLIP.MEAN_FILTER must be 0 or odd"),
        (cfg.INPUT.FORMAT == "RGB", "INPUT.FORMAT must be RGB: CLIP's normalisation is in that order"),
        (0 <= cfg.INPUT.COLOR_JITTER < 1, "INPUT.COLOR_JITTER must be at least 0 and below 1"),
        (any(losses), "all weights of MODEL.LOSS are 0: nothing would train"),
        (
            any(cfg.MODEL.DISTILLATION[f"{name}_WEIGHT"] for name in ("MASK", "FEATURE", "TEXT")),
            "all weights of MODEL.DISTILLATION are 0: nothing would train",
        ),
        (
            "/MSRA/" not in student.WEIGHTS
            or (student.FORMAT == "BGR" and cfg.MODEL.RESNETS.STRIDE_IN_1X1 and max(student.PIXEL_STD) == 1),
            "MODEL.STUDENT.WEIGHTS of MSRA need MODEL.RESNETS.STRIDE_IN_1X1 True, MODEL.STUDENT.FORMAT BGR,"
            " PIXEL_MEAN [103.53, 116.28, 123.675] and PIXEL_STD [1, 1, 1]",
        ),
        (student.DILATIONS and min(student.DILATIONS) > 0, "MODEL.STUDENT.DILATIONS must be whole numbers above 0"),
        (0 < cfg.HYPOTHESIS.WINDOW_RATIO <= 1, "HYPOTHESIS.WINDOW_RATIO must be above 0 and at most 1"),
        (
            not cfg.HYPOTHESIS.CROP_AWARE or cfg.HYPOTHESIS.METHOD == "crops",
            "HYPOTHESIS.CROP_AWARE needs HYPOTHESIS.METHOD crops: the others know no windows",
        ),
        (cfg.HYPOTHESIS.BATCH_SIZE > 0, "HYPOTHESIS.BATCH_SIZE must be above 0"),
        (
            cfg.HYPOTHESIS.METHOD != "imported" or cfg.HYPOTHESIS.FILE,
            "HYPOTHESIS.METHOD imported needs HYPOTHESIS.FILE: write it with tools/import_public_hypotheses.py",
        ),
        *(
            (
                not (maskclip and cfg.MODEL.CLIP[key]),
                f"MODEL.CLIP.{key} is of RectifiedCLIP: MaskCLIP has nothing to train, set it to False",
            )
            for key in ("LEARNABLE_QUERY", "FINE_TUNE")
        ),
        (
            not (cfg.MODEL.CLIP.FINE_TUNE and cfg.MODEL.CLIP.AUTOCAST == "float16"),
            "MODEL.CLIP.FINE_TUNE trains in MODEL.CLIP.AUTOCAST float32 or bfloat16: float16 needs the scaled gradients"
            " of SOLVER.AMP",
        ),
        (cfg.MODEL.CLIP.LAYER_NORM_EPS >= 0, "MODEL.CLIP.LAYER_NORM_EPS must be 0 or above"),
        (cfg.MODEL.BIAS_HEAD.NAME_TOKENS >= 0, "MODEL.BIAS_HEAD.NAME_TOKENS must be 0 or above"),
        (cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH > 0, "MODEL.BIAS_HEAD.PROMPT_LENGTH must be above 0"),
        (
            all(isinstance(width, int) and width > 0 for width in cfg.MODEL.BIAS_HEAD.SPACE_CHANNELS),
            "MODEL.BIAS_HEAD.SPACE_CHANNELS must be whole numbers above 0",
        ),
        (cfg.MODEL.GUMBEL.TAU >= 0, "MODEL.GUMBEL.TAU must be 0 or above"),
        (cfg.MODEL.LOSS.TAU >= 0, "MODEL.LOSS.TAU must be 0 or above"),
        (
            steps_fit,
            "TEST.SLIDING_WINDOW.STRIDE must be two numbers above 0 and at most SIZE's, or windows leave holes",
        ),
        (min(cfg.INPUT.COPIES.FROM_PIXELS, cfg.INPUT.COPIES.SHORT_SIDE) > 0, "INPUT.COPIES must be above 0"),
        (min(cfg.INPUT.TILES.FROM_SIDE, cfg.INPUT.TILES.SIZE) > 0, "INPUT.TILES.FROM_SIDE and SIZE must be above 0"),
        (0 <= cfg.INPUT.TILES.OVERLAP < 1, "INPUT.TILES.OVERLAP must be at least 0 and below 1, or tiles never end"),
        (cfg.TEST.BAND_MEMORY > 0, "TEST.BAND_MEMORY must be above 0 MiB"),
        (cfg.LINEAR_PROBE.MAX_ITER > 0, "LINEAR_PROBE.MAX_ITER must be above 0"),
        (cfg.SOLVER.ACCUMULATE_STEPS > 0, "SOLVER.ACCUMULATE_STEPS must be above 0"),
        (cfg.TEST.BIAS.BIN_WIDTH > 0, "TEST.BIAS.BIN_WIDTH must be above 0"),
        (cfg.TEST.BIAS.MIN_OBJECT_AREA > 0, "TEST.BIAS.MIN_OBJECT_AREA must be above 0: objects have pixels"),
        (cfg.TEST.BIAS.MIN_BIN_OBJECTS > 0, "TEST.BIAS.MIN_BIN_OBJECTS must be above 0: empty bins have no IoU"),
    )
    for holds, message in rules:
        if not holds:
            raise ReclipError(message)
