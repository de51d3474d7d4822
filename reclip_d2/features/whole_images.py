"""Features of whole images at the test resolution: from a feature store that has them, or encoded one by one.

Shape letters: (h, w) patch grid of an image without padding, D width of the joint embedding, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.features.store import FeatureStore, budget_problem, build_store, images_digest, stores_exist
from reclip_d2.features.views import WHOLE, ViewPlan, Views
from reclip_d2.modeling.view_batch import ViewEncoder, round_features

logger = logging.getLogger(__name__)


class WholeImages(Sequence[Tensor]):
    """Image features Z ``(h, w, D)`` float32 of each image, without padding, on the CPU.

    Features are rounded to half precision, so that those of a store and encoded ones are the same.
    """

    def __init__(self, views: Views, stride: int, source: FeatureStore | ViewEncoder) -> None:
        """
        Args:
            views: of which each image's first is the whole image.
            stride: pixels per patch of the features.
            source: complete store of the views, or what encodes them.
        """
        self.views = views
        self.stride = stride
        self.source = source

    def __len__(self) -> int:
        return len(self.views.records)

    def __getitem__(self, image: int) -> Tensor:
        number = image * self.views.plan.number
        if isinstance(self.source, FeatureStore):
            stored = self.source.read(number)
            return inside_image(stored.features, stored.size, self.stride).float()
        features, size = self.source(self.views.sample(number)["image"])
        return inside_image(round_features(features), size, self.stride).cpu()


def inside_image(features: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Features ``(h, w, D)`` of the patches whose centre is in the image of size (H, W), at least one a side."""
    rows, columns = (max(1, math.ceil(side / stride - 0.5)) for side in size)
    return features[:rows, :columns]


def whole_images(
    cfg: CfgNode, backbone: VisionLanguageBackbone, records: Sequence[dict[str, Any]], encode: ViewEncoder
) -> WholeImages:
    """Features of ``DATASETS.TRAIN``. Called by all processes.

    They come from a complete store of whole images, with or without mirror images, if there is one. If the config asks
    for such a store, an incomplete one is completed. Otherwise images are encoded when they are asked for, and nothing
    is written.

    Args:
        backbone: the frozen backbone of the features.
        records: unlabelled.
        encode: encodes a view with the backbone.
    """
    keys = cfg.FEATURE_STORE
    wanted = keys.VIEWS if keys.KIND == WHOLE else 0
    plan = ViewPlan.whole_images(cfg)
    if wanted or stores_exist(cfg):
        images = comm.all_gather(images_digest(records) if comm.is_main_process() else "")[0]
        for number in sorted((1, 2), key=lambda number: number != wanted):
            store = build_store(cfg, backbone, records, dataclasses.replace(plan, number=number), images)
            if number == wanted and not budget_problem(store, keys.MAX_SIZE):
                store.make(encode)
            elif not store.is_complete():
                continue
            logger.info("features of whole images: from %s", store.folder)
            return WholeImages(store.views, backbone.stride, store)
    return WholeImages(Views(cfg, records, plan), backbone.stride, encode)
