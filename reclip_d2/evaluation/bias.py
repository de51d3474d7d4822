"""The evaluators of the two biases, from the config."""

from __future__ import annotations

import os

from detectron2.config import CfgNode

from reclip_d2.evaluation.class_preference import ClassPreferenceEvaluator
from reclip_d2.evaluation.label_evaluator import LabelEvaluator
from reclip_d2.evaluation.space_preference import SpacePreferenceEvaluator


def build_bias_evaluators(cfg: CfgNode, dataset_name: str) -> list[LabelEvaluator]:
    """Class-preference and space-preference evaluators if ``TEST.BIAS.ENABLED``, otherwise none.

    Matrix and curve are written to ``OUTPUT_DIR/inference``.
    """
    bias = cfg.TEST.BIAS
    if not bias.ENABLED:
        return []
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return [
        ClassPreferenceEvaluator(dataset_name, output_dir=folder),
        SpacePreferenceEvaluator(
            dataset_name,
            output_dir=folder,
            bin_width=bias.BIN_WIDTH,
            min_object_area=bias.MIN_OBJECT_AREA,
            min_bin_objects=bias.MIN_BIN_OBJECTS,
        ),
    ]
