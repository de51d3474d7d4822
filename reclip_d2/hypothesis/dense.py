"""Hypotheses from dense labels (``HYPOTHESIS.METHOD dense``); not in the papers.

Eq. (6) asks CLIP about 121 crops of each image; this takes the labels of the image's patches, from one forward pass. An
offset per class corrects CLIP's preference for some class names: it gives the labels of all images the class shares
estimated by :mod:`reclip_d2.modeling.class_shares`. A class is in the hypothesis of an image if more than a share t of
the patches has its label.

Shape letters: n patches, D width of the joint embedding, C classes, (h, w) patch grid of a view.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reclip_d2.features.recomputed import RecomputedFeatures
from reclip_d2.features.store import FeatureStore
from reclip_d2.features.whole_images import inside_image
from reclip_d2.modeling.calibration import mean_probability_offset
from reclip_d2.modeling.class_shares import MAX_SAMPLES, estimate_class_shares
from reclip_d2.utils.progress import count_steps

logger = logging.getLogger(__name__)

OWN, UNIFORM, ESTIMATED = "own", "uniform", "estimated"


Features = FeatureStore | RecomputedFeatures
"""Features of views whose first is the whole image."""


def whole_view(store: Features, image: int) -> tuple[Tensor, tuple[int, int]]:
    """Features Z ``(n, D)`` float32 of the patches of an image at test resolution, without padding, and its (H, W)."""
    stored = store.read(image * store.views.plan.number)
    features = inside_image(stored.features, stored.size, store.patch_size)
    return features.flatten(0, 1).float(), stored.placement.image_size


def sample_features(store: Features, count: int = MAX_SAMPLES) -> Tensor:
    """About ``count`` features Z ``(n, D)``, spread evenly over the images and over each image."""
    images = len(store.views.records)
    stride = max(1, images // count)
    each = max(1, count // len(range(0, images, stride)))
    parts = []
    for image in range(0, images, stride):
        features, _ = whole_view(store, image)
        parts.append(features[:: math.ceil(len(features) / each)])
    return torch.cat(parts)


def class_offset(features: Tensor, query_features: Tensor, logit_scale: float, shares: str) -> Tensor:
    """Offset ``(C,)`` to add to CLIP's logits, which corrects its preference for some classes.

    Args:
        features: Z ``(n, D)`` of a sample of patches.
        query_features: W_q ``(C, D)``.
        shares: class shares of the labels: CLIP's ``own`` (no offset), ``uniform`` or ``estimated``.
    """
    if shares == OWN:
        return torch.zeros(len(query_features))
    target = None
    if shares == ESTIMATED:
        target = estimate_class_shares(features, query_features, logit_scale)
        logger.info("estimated class shares: %s", " ".join(f"{share:.3f}" for share in target.tolist()))
    return mean_probability_offset(features @ query_features.T, logit_scale, target)


def dense_lines(store: Features, query_features: Tensor, logit_scale: float, shares: str) -> Iterator[dict[str, Any]]:
    """Lines of the hypothesis file: the share of each class among the labels of an image, as ``scores``.

    Args:
        store: the features; a store must be complete.
        query_features: W_q ``(C, D)`` on the CPU.
        shares: see :func:`class_offset`.
    """
    offset = class_offset(sample_features(store), query_features, logit_scale, shares)
    with count_steps("hypotheses", len(store.views.records)) as steps:
        for image, record in enumerate(store.views.records):
            features, size = whole_view(store, image)
            labels = (features @ query_features.T + offset).argmax(1)
            frequency = torch.bincount(labels, minlength=len(query_features)) / len(labels)
            yield {
                "image_id": record["image_id"],
                "size": list(size),
                "scores": [round(share, 5) for share in frequency.tolist()],
            }
            steps.advance()
