"""The feature stores of a run on a user's images."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.features.recomputed import RecomputedFeatures
from reclip_d2.features.store import FeatureStore, budget_problem, build_store, images_digest
from reclip_d2.features.views import WHOLE, ViewPlan
from reclip_d2.hypothesis.dense import Features
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.modeling.view_batch import ViewEncoder
from reclip_d2.utils.files import format_bytes
from reclip_d2.utils.progress import say
from reclip_d2.utils.work_shard import WorkShard


def training_stores(cfg: CfgNode, backbone: VisionLanguageBackbone) -> list[FeatureStore]:
    """The stores that hypotheses and training of ``cfg`` read, complete or not; one serves both if its views suit both.

    Args:
        backbone: the frozen backbone of the features.
    """
    keys, plans = cfg.FEATURE_STORE, []
    if keys.VIEWS:
        plans.append(ViewPlan.from_config(cfg))
    if cfg.HYPOTHESIS.METHOD == "dense" and not (keys.VIEWS and keys.KIND == WHOLE):
        plans.append(ViewPlan.whole_images(cfg))
    if not plans:
        return []
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    digest = images_digest(records)
    return [build_store(cfg, backbone, records, plan, digest) for plan in plans]


def make_stores_part(cfg: CfgNode, backbone: VisionLanguageBackbone, part: WorkShard) -> bool:
    """Compute a part of each store of ``cfg`` for which there is room; returns whether none is incomplete."""
    stores = [s for s in training_stores(cfg, backbone) if s.shards.missing()]
    stores = [store for store in stores if not budget_problem(store, cfg.FEATURE_STORE.MAX_SIZE)]
    backbone.to(cfg.MODEL.DEVICE)
    statistics = backbone.pixel_statistics
    mean, std = (torch.tensor(v, device=cfg.MODEL.DEVICE).view(-1, 1, 1) for v in (statistics.mean, statistics.std))
    for store in stores:
        store.make(ViewEncoder(backbone, mean, std), part)
    return all(store.is_complete() for store in stores)


def whole_features(cfg: CfgNode, backbone: VisionLanguageBackbone, encode: ViewEncoder) -> Features:
    """Features of the whole training images: of the training's store, or of one that is made here; without room for one
    they are encoded whenever they are read.

    Args:
        encode: encoder of the backbone.
    """
    store = next((s for s in training_stores(cfg, backbone) if s.views.plan.kind == WHOLE), None)
    if store is None:
        records = unlabelled_records(cfg.DATASETS.TRAIN)
        store = build_store(cfg, backbone, records, ViewPlan.whole_images(cfg), images_digest(records))
    if budget_problem(store, cfg.FEATURE_STORE.MAX_SIZE):
        return RecomputedFeatures(store.views, store.patch_size, encode)
    store.make(encode)
    return store


def say_size(store: FeatureStore, limit: float) -> bool:
    """Report the size of a store that is not complete, before it is made; returns whether there is room for it.

    Args:
        limit: ``FEATURE_STORE.MAX_SIZE`` in GiB.
    """
    images, number = len(store.views.records), store.views.plan.number
    what = f"{images:,} image{'s' if images > 1 else ''} x {number} view{'s' if number > 1 else ''}"
    if problem := budget_problem(store, limit):
        say("features", f"not stored, but encoded whenever they are needed, which is slow: {problem}")
        return False
    if store.shards.missing():
        say("features", f"{what} take {format_bytes(store.bytes())} of disk until the run ends")
    return True
