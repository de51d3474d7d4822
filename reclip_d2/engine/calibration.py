"""Fit the mean-probability calibration of MaskCLIP on unlabelled images (a control, not in the papers)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.modeling.bias_head import query_logits
from reclip_d2.modeling.calibration import mean_probability_offset
from reclip_d2.modeling.class_shares import MAX_SAMPLES, estimate_class_shares
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.utils.progress import count_steps

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(
    model: MaskCLIP, records: Sequence[dict[str, Any]], mapper: UnlabelledDatasetMapper, max_images: int = 2000
) -> None:
    """Set ``model.calibration_offset`` so that the mean softmax over unlabelled images is uniform or, with
    ``estimated``, equals the class shares of :mod:`reclip_d2.modeling.class_shares`.

    With ``class`` and ``estimated``, the mean is over all patches of all images, and the offset is ``(C, 1, 1)``. With
    ``position_class``, the mean at each patch is over the images, and the offset is ``(C, h, w)`` on the grid of the
    first image, to which the logits of other images are resized.

    Args:
        model: a MaskCLIP with ``calibration`` other than ``none``.
        records: unlabelled records with ``file_name``.
        mapper: the test mapper, so that images have the test resolution.
        max_images: maximum number of images, spread evenly over the records.
    """
    step = max(1, -(-len(records) // max_images))
    images = records[::step]
    logger.info("Mean-probability calibration (%s) on %d images", model.calibration, len(images))
    samples, patches, size = [], [], None
    estimated = model.calibration == "estimated"
    with count_steps("calibration", len(images)) as steps:
        for record in images:
            image = model.preprocess_image([mapper(record)])
            features = model.backbone.dense(image.tensor, image.image_sizes)
            logits = query_logits(features, model.query_features)
            rows, columns = (_patches(side, model.backbone.patch_size) for side in image.image_sizes[0])
            logits = logits[..., :rows, :columns]  # without padding
            if model.calibration == "position_class":
                size = size or logits.shape[-2:]
                if logits.shape[-2:] != size:
                    logits = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            samples.append(logits[0].flatten(1).T.cpu())  # (n, C)
            if estimated:
                some = features[0, :, :rows, :columns].flatten(1).T  # (n, D)
                patches.append(some[:: -(-len(some) * len(images) // MAX_SAMPLES)].cpu())
            steps.advance()
    scale = model.backbone.logit_scale
    if model.calibration != "position_class":
        shares = None
        if estimated:
            shares = estimate_class_shares(torch.cat(patches), model.query_features.cpu(), scale)
        offset = mean_probability_offset(torch.cat(samples), scale, shares)[:, None, None]
    else:
        offset = mean_probability_offset(torch.stack(samples), scale).T.unflatten(1, size)
    model.calibration_offset = offset.to(model.device)


def _patches(side: int, patch: int) -> int:
    """Number of patches along a side whose centre is in the image, at least one."""
    return max(1, math.ceil(side / patch - 0.5))
