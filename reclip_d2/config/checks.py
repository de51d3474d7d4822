"""Rules that the values of the keys obey."""

from __future__ import annotations

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
            raise ReclipError(f"{key} is {node!r}; choose one of {', '.join(choices)}")
    kernel, mean_filter = cfg.MODEL.MASK_DECODER.KERNEL_SIZE, cfg.MODEL.MASKCLIP.MEAN_FILTER
    losses = [cfg.MODEL.LOSS[f"{name}_WEIGHT"] for name in ("CONTRASTIVE", "COVERAGE", "OUTSIDE")]
    window = cfg.TEST.SLIDING_WINDOW
    steps_fit = len(window.SIZE) == len(window.STRIDE) == 2 and all(
        0 < step <= size for size, step in zip(window.SIZE, window.STRIDE, strict=True)
    )
    rules = (
        (kernel > 0 and kernel % 2 == 1, "MODEL.MASK_DECODER.KERNEL_SIZE must be odd"),
        (mean_filter == 0 or (mean_filter > 0 and mean_filter % 2 == 1), "MODEL.MASKCLIP.MEAN_FILTER must be 0 or odd"),
        (cfg.INPUT.FORMAT == "RGB", "INPUT.FORMAT must be RGB: CLIP's normalisation is in that order"),
        (0 <= cfg.INPUT.COLOR_JITTER < 1, "INPUT.COLOR_JITTER must be at least 0 and below 1"),
        (any(losses), "all weights of MODEL.LOSS are 0: nothing would train"),
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
        (cfg.MODEL.CLIP.LAYER_NORM_EPS >= 0, "MODEL.CLIP.LAYER_NORM_EPS must be 0 or above"),
        (cfg.MODEL.BIAS_HEAD.NAME_TOKENS >= 0, "MODEL.BIAS_HEAD.NAME_TOKENS must be 0 or above"),
        (cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH > 0, "MODEL.BIAS_HEAD.PROMPT_LENGTH must be above 0"),
        (cfg.MODEL.GUMBEL.TAU >= 0, "MODEL.GUMBEL.TAU must be 0 or above"),
        (cfg.MODEL.LOSS.TAU >= 0, "MODEL.LOSS.TAU must be 0 or above"),
        (
            steps_fit,
            "TEST.SLIDING_WINDOW.STRIDE must be two numbers above 0 and at most SIZE's, or windows leave holes",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise ReclipError(message)
