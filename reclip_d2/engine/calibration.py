"""Fit the mean-probability calibration of MaskCLIP on unlabelled images (a control, not in the papers)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from reclip_d2.modeling.bias_head import query_logits
from reclip_d2.modeling.calibration import mean_probability_offset
from reclip_d2.modeling.class_shares import MAX_SAMPLES, estimate_class_shares
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.utils.progress import count_steps

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(model: MaskCLIP, images: Sequence[Tensor], max_images: int = 2000, shares: Tensor | None = None) -> None:
    """Set ``model.calibration_offset`` so that the mean softmax over unlabelled images is uniform or, with
    ``estimated``, equals the class shares of :mod:`reclip_d2.modeling.class_shares`.

    With ``class`` and ``estimated``, the mean is over all patches of all images, and the offset is ``(C, 1, 1)``. With
    ``position_class``, the mean at each patch is over the images, and the offset is ``(C, h, w)`` on the grid of the
    first image, to which the logits of other images are resized.

    Args:
        model: a MaskCLIP with ``calibration`` other than ``none``.
        images: Z ``(h, w, D)`` of each image at the test resolution, such as
            :class:`~reclip_d2.features.whole_images.WholeImages`.
        max_images: maximum number of images, spread evenly.
        shares: class shares ``(C,)`` to use in place of the estimated ones.
    """
    chosen = range(0, len(images), max(1, -(-len(images) // max_images)))
    logger.info("Mean-probability calibration (%s) on %d images", model.calibration, len(chosen))
    query_features = model.query_features.cpu()
    samples, patches, size = [], [], None
    estimated = model.calibration == "estimated"
    with count_steps("calibration", len(chosen)) as steps:
        for image in chosen:
            features = images[image]
            logits = query_logits(features.permute(2, 0, 1)[None], query_features)
            if model.calibration == "position_class":
                size = size or logits.shape[-2:]
                if logits.shape[-2:] != size:
                    logits = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            samples.append(logits[0].flatten(1).T)  # (n, C)
            if estimated:
                some = features.flatten(0, 1)  # (n, D)
                patches.append(some[:: -(-len(some) * len(chosen) // MAX_SAMPLES)])
            steps.advance()
    scale = model.backbone.logit_scale
    if model.calibration != "position_class":
        if estimated and shares is None:
            shares = estimate_class_shares(torch.cat(patches), query_features, scale)
        offset = mean_probability_offset(torch.cat(samples), scale, shares)[:, None, None]
    else:
        offset = mean_probability_offset(torch.stack(samples), scale).T.unflatten(1, size)
    model.calibration_offset = offset.to(model.device)
