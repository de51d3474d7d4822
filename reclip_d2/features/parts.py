"""The shards of a feature store as parts that are made on their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.features.store import FeatureStore, budget_problem
from reclip_d2.modeling.view_batch import ViewEncoder
from reclip_d2.utils.work_shard import WorkShard


def view_encoder(cfg: CfgNode, backbone: VisionLanguageBackbone) -> ViewEncoder:
    """The encoder of a frozen backbone, moved to ``MODEL.DEVICE``."""
    backbone.to(cfg.MODEL.DEVICE)
    statistics = backbone.pixel_statistics
    mean, std = (torch.tensor(v, device=cfg.MODEL.DEVICE).view(-1, 1, 1) for v in (statistics.mean, statistics.std))
    return ViewEncoder(backbone, mean, std)


class StoreParts:
    """The :class:`~reclip_d2.utils.work_parts.WorkParts` of a feature store."""

    stage, unit = "features", "view"

    def __init__(self, store: FeatureStore, limit: float, encoder: Callable[[], ViewEncoder]) -> None:
        """
        Args:
            limit: ``FEATURE_STORE.MAX_SIZE`` in GiB.
            encoder: builds the encoder of the views; called only to make a part.
        """
        self.store = store
        self.target, self.count = store.folder, len(store.shards.ranges)
        self._limit, self._encoder = limit, encoder

    def problem(self) -> str:
        """See :func:`~reclip_d2.features.store.budget_problem`."""
        return budget_problem(self.store, self._limit)

    def missing(self) -> list[int]:
        """See :meth:`FeatureStore.missing`."""
        return self.store.missing()

    def steps(self, number: int) -> int:
        """Views of a shard."""
        return len(self.store.shards.ranges[number])

    def file(self, number: int) -> Path:
        """The file of a shard."""
        return self.store.shards.file(number)

    def make(self, part: WorkShard) -> None:
        """See :meth:`FeatureStore.make`."""
        self.store.make(self._encoder(), part)
