"""The feature stores of a training, and the parts of its work that are made before it."""

from __future__ import annotations

from detectron2.config import CfgNode

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.features.parts import StoreParts, view_encoder
from reclip_d2.features.recomputed import RecomputedFeatures
from reclip_d2.features.store import FeatureStore, budget_problem, build_store
from reclip_d2.features.views import WHOLE, ViewPlan
from reclip_d2.hypothesis.dense import Features
from reclip_d2.hypothesis.training_records import TrainingImages, hypothesis_parts, make_hypothesis_part
from reclip_d2.modeling.build import build_clip_backbone
from reclip_d2.modeling.view_batch import ViewEncoder
from reclip_d2.utils.files import format_bytes
from reclip_d2.utils.progress import say
from reclip_d2.utils.work_parts import WorkParts
from reclip_d2.utils.work_shard import WorkShard


def training_stores(
    cfg: CfgNode, backbone: VisionLanguageBackbone, images: TrainingImages | None = None
) -> list[FeatureStore]:
    """The stores that hypotheses and training of ``cfg`` read, complete or not; one serves both if its views suit both.

    Args:
        backbone: the frozen backbone of the features.
        images: those of the config; None to list them.
    """
    keys, plans = cfg.FEATURE_STORE, []
    if keys.VIEWS:
        plans.append(ViewPlan.from_config(cfg))
    if cfg.HYPOTHESIS.METHOD == "dense" and not (keys.VIEWS and keys.KIND == WHOLE):
        plans.append(ViewPlan.whole_images(cfg))
    if not plans:
        return []
    images = images or TrainingImages.of(cfg)
    return [build_store(cfg, backbone, images.records, plan, images.digest) for plan in plans]


def store_parts(cfg: CfgNode, images: TrainingImages) -> list[StoreParts]:
    """The parts of the stores of ``cfg``."""
    backbone, limit = build_clip_backbone(cfg), cfg.FEATURE_STORE.MAX_SIZE
    stores = training_stores(cfg, backbone, images)
    return [StoreParts(store, limit, lambda: view_encoder(cfg, backbone)) for store in stores]


def training_parts(cfg: CfgNode, images: TrainingImages, stores: bool = True) -> list[WorkParts]:
    """The parts that the hypotheses of ``cfg`` are made from, if their file is missing, and those of its stores.

    Args:
        stores: whether also those of stores that the hypotheses do not read.
    """
    hypotheses = hypothesis_parts(cfg, images)
    found: list[WorkParts] = [] if hypotheses is None else [hypotheses]
    others = store_parts(cfg, images) if stores else []
    return found + [parts for parts in others if hypotheses is None or parts.target != hypotheses.target]


def make_part(cfg: CfgNode, part: WorkShard) -> bool:
    """Compute a part of what the hypotheses are made from, and of the stores for which there is room; returns whether
    no part is missing any more.

    Raises:
        ReclipError: see :func:`~reclip_d2.hypothesis.training_records.make_hypothesis_part`.
    """
    images = TrainingImages.of(cfg)
    complete = make_hypothesis_part(cfg, part, images)
    stores = [parts for parts in store_parts(cfg, images) if parts.missing() and not parts.problem()]
    for parts in stores:
        parts.make(part)
    return complete and not any(parts.missing() for parts in stores)


def whole_features(cfg: CfgNode, backbone: VisionLanguageBackbone, encode: ViewEncoder) -> Features:
    """Features of the whole training images: of the training's store, or of one that is made here; without room for one
    they are encoded whenever they are read.

    Args:
        encode: encoder of the backbone.
    """
    store = next((s for s in training_stores(cfg, backbone) if s.views.plan.kind == WHOLE), None)
    if store is None:
        images = TrainingImages.of(cfg)
        store = build_store(cfg, backbone, images.records, ViewPlan.whole_images(cfg), images.digest)
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
