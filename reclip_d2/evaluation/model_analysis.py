"""The data of one model for a bias report, so that the model itself can be freed.

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from torch import nn

from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper, build_test_mapper
from reclip_d2.data.images import read_image
from reclip_d2.evaluation.class_preference import ClassPreferenceEvaluator
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.evaluation.logit_parts import LogitParts, has_bias, logit_parts
from reclip_d2.evaluation.preferences import Preference, mean_bias, mean_probability, spread_records
from reclip_d2.evaluation.space_preference import DistanceCurve, SpacePreferenceEvaluator
from reclip_d2.inference import DatasetPredictor, ImagePredictor


@dataclass
class ModelAnalysis:
    """The analysis of one model."""

    name: str
    source: str
    """Config file and checkpoint, for the reader."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """Results of the evaluators ``sem_seg``, ``class_preference``, ``space_preference``; empty without labels."""
    confusion: np.ndarray | None = None
    """``(C, C)`` pixels by label and prediction."""
    curve: DistanceCurve | None = None
    distances: np.ndarray | None = None
    """``(N,)`` distances of all objects, in pixels."""
    ious: np.ndarray | None = None
    """``(N,)`` IoUs of the same objects, 0 to 1."""
    half_diagonal: float = float("nan")
    """Half the images' diagonal, in pixels."""
    preference: Preference | None = None
    """From the mean soft-max (MaskCLIP) or the bias logits; None for models without either."""
    predictions: list[np.ndarray] = field(default_factory=list)
    """Label maps ``(H, W)`` of the drawn scenes, in order."""
    parts: list[LogitParts] = field(default_factory=list)
    """Logit parts of the drawn scenes; empty for models without bias logits."""

    def class_ious(self, class_names: Sequence[str]) -> np.ndarray:
        """``(C,)`` IoU per class in percent; NaN for classes without labels."""
        return np.array([self.results["sem_seg"][f"IoU-{name}"] for name in class_names])


def is_labelled(dataset: str) -> bool:
    """Whether all records of a registered data set have a label file."""
    return all("sem_seg_file_name" in record for record in DatasetCatalog.get(dataset))


def evaluate_bias(cfg: CfgNode, model: nn.Module, dataset: str, bias: CfgNode, analysis: ModelAnalysis) -> None:
    """mIoU and the two bias scores, in one pass over a labelled data set; fills ``analysis``.

    Args:
        cfg: the model's config, for the test resolution.
        bias: ``TEST.BIAS``, the same for all models of a report.
    """
    classes = ClassPreferenceEvaluator(dataset)
    space = SpacePreferenceEvaluator(
        dataset,
        bin_width=bias.BIN_WIDTH,
        min_object_area=bias.MIN_OBJECT_AREA,
        min_bin_objects=bias.MIN_BIN_OBJECTS,
    )
    evaluators = DatasetEvaluators([LabelMapEvaluator(dataset, distributed=True, output_dir=None), classes, space])
    loader = build_detection_test_loader(cfg, dataset, mapper=build_test_mapper(cfg))
    analysis.results = inference_on_dataset(DatasetPredictor.from_config(model, cfg), loader, evaluators)
    analysis.confusion, analysis.curve = classes.confusion, space.curve
    analysis.distances, analysis.ious, analysis.half_diagonal = space.distances, space.ious, space.half_diagonal


def find_preference(
    cfg: CfgNode, model: nn.Module, records: Sequence[dict[str, Any]], max_images: int
) -> Preference | None:
    """Preference from a rectified model's bias logits, or from MaskCLIP's mean soft-max; None for other models."""
    mapper = UnlabelledDatasetMapper(cfg, is_train=False)
    if has_bias(model):
        return mean_bias(model, mapper, spread_records(records, max_images))
    # Key smoothing turns logits into probabilities.
    if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP" and not cfg.MODEL.MASKCLIP.KEY_SMOOTHING:
        return mean_probability(model, mapper, spread_records(records, max_images))
    return None


def look_at_scenes(cfg: CfgNode, model: nn.Module, scenes: Sequence[dict[str, Any]], analysis: ModelAnalysis) -> None:
    """Predictions and logit parts of the scenes to draw; fills ``analysis``."""
    predictor = ImagePredictor.from_config(model, cfg).without_unsupported_classes(cfg)
    analysis.predictions = [
        predictor.labels(read_image(record["file_name"]), record["file_name"]).astype(np.int64) for record in scenes
    ]
    if has_bias(model):
        mapper = UnlabelledDatasetMapper(cfg, is_train=False)
        analysis.parts = [logit_parts(model, mapper, record) for record in scenes]
