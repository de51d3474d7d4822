"""Choose among a run's models without labels: MaskCLIP, MaskCLIP calibrated to estimated class shares, and what was
trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode

from reclip_d2.evaluation.label_free import (
    Candidate,
    Verdict,
    judge_masks,
    judged_images,
    predicted_labels,
    reference_from_store,
)
from reclip_d2.hypothesis.dense import ESTIMATED, class_offset, sample_features
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.checkpoint import FINAL_CHECKPOINT, ReclipCheckpointer
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.utils.progress import count_steps
from reclip_d2.workspace.stores import whole_features


@torch.no_grad()
def calibrate_maskclip(model: MaskCLIP, cfg: CfgNode, training: CfgNode) -> None:
    """Find the offset that gives MaskCLIP's labels the estimated class shares, and write the checkpoint.

    Args:
        model: with calibration ``estimated``.
        cfg: its config.
        training: config of the training, whose data set is registered.
    """
    features = whole_features(training, model.backbone, model.view_encoder)
    offset = class_offset(sample_features(features), model.query_features.cpu(), model.backbone.logit_scale, ESTIMATED)
    model.calibration_offset = offset[:, None, None].to(model.device)
    ReclipCheckpointer(model, cfg.OUTPUT_DIR).save(FINAL_CHECKPOINT.removesuffix(".pth"))


def judge(kinds: Sequence[str], load: Callable[[str], ImagePredictor], training: CfgNode) -> Verdict:
    """Judge a run's models without labels.

    Args:
        kinds: MaskCLIP first.
        load: loads the predictor of a kind; the training images are registered afterwards.
        training: config of the training.
    """
    maskclip = load(kinds[0]).model
    features = whole_features(training, maskclip.backbone, maskclip.view_encoder)
    reference = reference_from_store(features, maskclip.query_features, maskclip.backbone.logit_scale)
    images = judged_images(features)
    candidates = []
    with count_steps("judgement", len(kinds), unit="model") as steps:
        for kind in kinds:
            model = maskclip if kind == kinds[0] else load(kind).model
            candidates.append(Candidate(kind, predicted_labels(model, features, images)))
            steps.advance()
    return judge_masks(candidates, reference)
