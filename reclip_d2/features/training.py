"""Training samples of fixed views: from the feature store, or with pixels for the model to encode.

Shape letters: (h, w) patch grid, D width of the joint embedding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import Dataset

from reclip_d2.errors import ReclipError
from reclip_d2.features.resident import ResidentFeatures, resident_features
from reclip_d2.features.store import FeatureStore, budget_problem, build_store, images_digest
from reclip_d2.features.views import ViewPlan, Views
from reclip_d2.modeling.meta_arch.distillation import Distillation
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


class FixedViews(Dataset):
    """Samples by ``(draw, index)``, like :class:`~reclip_d2.data.sampling.NumberedDataset`: a view of an image with its
    ``hypothesis`` and, from a store, its ``features`` ``(h, w, D)`` and ``view_size``."""

    def __init__(
        self,
        views: Views,
        store: FeatureStore | None,
        pixels: bool,
        held_out: frozenset[int] = frozenset(),
        device: torch.device = CPU,
        device_memory: float = 0.0,
    ) -> None:
        """
        Args:
            views: the views of the data set.
            store: store of their features; None to return pixels for the model to encode.
            pixels: return ``image`` even from a store, for a student or for images in TensorBoard.
            held_out: numbers of views that are not drawn; the next view of the image replaces them.
            device: the model's.
            device_memory: fraction of its free memory that the store may take, from the first sample on. With
                ``pixels`` it stays on disk: these samples come from worker processes, which cannot share the device.
        """
        self.views = views
        self.store = store
        self.pixels = pixels
        self.held_out = held_out
        self.device = device
        self.device_memory = 0.0 if pixels else device_memory

    @property
    def reads_pixels(self) -> bool:
        """Whether samples read image files."""
        return self.pixels or self.store is None

    @functools.cached_property
    def _features(self) -> FeatureStore | ResidentFeatures:
        assert self.store is not None
        return resident_features(self.store, self.device, self.device_memory) or self.store

    def __len__(self) -> int:
        return len(self.views.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        draw, index = key
        number = self.views.number(index, draw)
        return self.sample(number + 1 if number in self.held_out else number)

    def sample(self, number: int) -> dict[str, Any]:
        """The sample of a view by its number."""
        index = number // self.views.plan.number
        if self.store is None:
            return {**self.views.sample(number), "fixed_view": True}
        stored = self._features.read(number)
        if self.pixels:
            sample = self.views.sample(number)
        else:
            sample = {k: v for k, v in self.views.records[index].items() if k != "crop_hypothesis"}
            hypothesis = self.views.hypothesis(index, stored.placement, stored.size)
            if hypothesis is not None:
                sample["hypothesis"] = torch.as_tensor(hypothesis, dtype=torch.int64)
        return {**sample, "features": stored.features, "view_size": stored.size}


def feature_source(model: torch.nn.Module) -> CLIPSegmentor:
    """The model whose features are stored: for distillation, the teacher.

    Raises:
        ReclipError: the model has no frozen CLIP.
    """
    source = model.teacher if isinstance(model, Distillation) else model
    if not isinstance(source, CLIPSegmentor):
        raise ReclipError(f"FEATURE_STORE.VIEWS: {type(model).__name__} does not use features of a CLIP: set it to 0")
    if any(parameter.requires_grad for parameter in source.backbone.parameters()):
        raise ReclipError("FEATURE_STORE.VIEWS needs a frozen CLIP: with MODEL.CLIP.FINE_TUNE set it to 0")
    return source


def fixed_views(cfg: CfgNode, model: torch.nn.Module, records: Sequence[dict[str, Any]]) -> FixedViews:
    """Training data for ``FEATURE_STORE.VIEWS`` above 0; computes the store if it is missing. Called by all processes.

    Args:
        model: in any mode; its frozen CLIP encodes the views.
        records: from :func:`~reclip_d2.hypothesis.training_records.build_training_records`.
    """
    source = feature_source(model)
    images = comm.all_gather(images_digest(records) if comm.is_main_process() else "")[0]
    store = build_store(cfg, source.backbone, records, ViewPlan.from_config(cfg), images)
    pixels = isinstance(model, Distillation) or cfg.VIS_PERIOD > 0
    held_out = held_out_views(cfg, len(records))
    if problem := budget_problem(store, cfg.FEATURE_STORE.MAX_SIZE):
        logger.warning("feature store: %s: falling back to encoding views in each iteration, which is slow", problem)
        return FixedViews(store.views, None, pixels, held_out)
    store.make(source.view_encoder)
    return FixedViews(store.views, store, pixels, held_out, source.device, cfg.FEATURE_STORE.DEVICE_MEMORY)


def held_out_views(cfg: CfgNode, images: int) -> frozenset[int]:
    """Numbers of the views that ``SOLVER.PLATEAU`` holds out: the first view of some of the images, unless it is their
    only one."""
    keys, views = cfg.SOLVER.PLATEAU, cfg.FEATURE_STORE.VIEWS
    if not keys.ENABLED or views < 2:
        return frozenset()
    return frozenset(image * views for image in spread(images, keys.IMAGES))


def spread(total: int, number: int) -> list[int]:
    """Indices of images, evenly spread: ``number``, but at most a quarter of ``total``, rounded up.

    >>> spread(10, 4)
    [0, 3, 6]
    """
    number = min(number, -(-total // 4))
    return [k * total // number for k in range(number)]
