"""Training records: images of the data set with their hypotheses, without labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.precision import tower_precision
from reclip_d2.backbones.query import get_templates
from reclip_d2.data.classes import check_registered, class_names_of
from reclip_d2.data.dataset_mapper import LABEL_KEYS
from reclip_d2.data.images import log_alpha
from reclip_d2.errors import ReclipError
from reclip_d2.features.parts import StoreParts, view_encoder
from reclip_d2.features.recomputed import RecomputedFeatures
from reclip_d2.features.store import FeatureStore, budget_problem, build_store, images_digest
from reclip_d2.features.views import WHOLE, ViewPlan
from reclip_d2.hypothesis.crop_aware import CropHypothesis
from reclip_d2.hypothesis.dense import dense_lines
from reclip_d2.hypothesis.file import (
    WINDOW_METHODS,
    HypothesisHeader,
    check_classes_per_image,
    find_threshold,
    hypotheses_of,
    write_hypothesis_file,
)
from reclip_d2.hypothesis.generate import (
    HypothesisGenerator,
    HypothesisParts,
    load_or_generate,
    load_or_make,
)
from reclip_d2.modeling.build import build_clip_backbone
from reclip_d2.utils.io import cache_dir
from reclip_d2.utils.work_parts import WorkParts
from reclip_d2.utils.work_shard import WorkShard

logger = logging.getLogger(__name__)


def unlabelled_records(datasets: tuple[str, ...] | list[str]) -> list[dict[str, Any]]:
    """Records of registered data sets without label entries, each with an ``image_id`` (by default its file name).

    Raises:
        ReclipError: a data set is unknown, there are no images, or two images have the same id.
    """
    records, seen = [], set()
    for name in datasets:
        check_registered(name)
        found = DatasetCatalog.get(name)
        log_alpha(name, (record["file_name"] for record in found))
        for record in found:
            record = {key: value for key, value in record.items() if key not in LABEL_KEYS}
            record.setdefault("image_id", record["file_name"])
            if record["image_id"] in seen:
                raise ReclipError(
                    f"two training images have the id {record['image_id']!r}: check {', '.join(datasets)}"
                )
            seen.add(record["image_id"])
            records.append(record)
    if not records:
        raise ReclipError(f"no training images in {', '.join(datasets) or 'DATASETS.TRAIN (empty)'}")
    return records


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """The images of ``DATASETS.TRAIN``, for processes in which these data sets need not be registered.

    Attributes:
        records: see :func:`unlabelled_records`.
        class_names: for each class its name and any synonyms.
        digest: see :func:`~reclip_d2.features.store.images_digest`; the main process's.
    """

    records: list[dict[str, Any]]
    class_names: list[list[str]]
    digest: str

    @classmethod
    def of(cls, cfg: CfgNode, digest: bool = True) -> TrainingImages:
        """The images of a config; called by all processes.

        Args:
            digest: whether it is needed, which reads all images; otherwise it is "".
        """
        records = unlabelled_records(cfg.DATASETS.TRAIN)
        own = images_digest(records) if digest and comm.is_main_process() else ""
        return cls(records, class_names_of(cfg.DATASETS.TRAIN[0]), comm.all_gather(own)[0])


def hypothesis_header(
    cfg: CfgNode,
    backbone: VisionLanguageBackbone,
    images: str = "",
    class_names: Sequence[Sequence[str]] | None = None,
) -> HypothesisHeader:
    """The header that the hypothesis file of ``DATASETS.TRAIN`` must have.

    All rules but ``dense`` use global features, of images or windows, and do not depend on the dense attention.

    Args:
        images: see :func:`~reclip_d2.features.store.images_digest`.
        class_names: those of the data set; None to look them up.
    """
    method = cfg.HYPOTHESIS.METHOD
    one_pass, dense = method == "one_pass", method == "dense"
    statistics, precision = backbone.pixel_statistics, tower_precision(cfg)
    return HypothesisHeader(
        dataset="+".join(cfg.DATASETS.TRAIN),
        class_names=[list(names) for names in class_names or class_names_of(cfg.DATASETS.TRAIN[0])],
        clip=backbone.name,
        fingerprint=backbone.fingerprint,
        templates=cfg.MODEL.CLIP.TEMPLATES,
        method=method,
        window_ratio=round(cfg.HYPOTHESIS.WINDOW_RATIO, 6) if method in WINDOW_METHODS else 0.0,
        image_sides=[cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST] if one_pass or dense else [0, 0],
        split_block=cfg.HYPOTHESIS.SPLIT_BLOCK if one_pass else 0,
        pixel_statistics=[[float(x) for x in values] for values in (statistics.mean, statistics.std)],
        images=images,
        attention=json.dumps(backbone.identity(), sort_keys=True) if dense else "",
        class_shares=cfg.HYPOTHESIS.CLASS_SHARES if dense else "",
        precision="" if precision == "float32" or method == "imported" else precision,
    )


def hypothesis_path(cfg: CfgNode, header: HypothesisHeader) -> Path:
    """``HYPOTHESIS.FILE``, or a file in the cache, named by a hash of all that the hypotheses depend on."""
    if cfg.HYPOTHESIS.FILE:
        return Path(cfg.HYPOTHESIS.FILE)
    digest = hashlib.sha256(json.dumps(header.fields()).encode()).hexdigest()[:16]
    return cache_dir() / "hypotheses" / f"{header.dataset}-{header.method}-{digest}.jsonl"


def _announce_legacy_file(path: Path, header: HypothesisHeader, records: list[dict[str, Any]]) -> None:
    """Log the path of a file from an earlier version, which named files by the sizes of the images."""
    if path.exists() or path.parent != cache_dir() / "hypotheses":
        return
    fields = header.fields()
    del fields["images"], fields["pixel_statistics"]
    files = [(r["image_id"], r["file_name"], _size(r["file_name"])) for r in records]
    digest = hashlib.sha256(json.dumps([fields, files]).encode()).hexdigest()[:16]
    legacy = path.with_name(f"{header.dataset}-{header.method}-{digest}.jsonl")
    if legacy.exists():
        logger.warning(
            "%s was made by an earlier version, which did not record the content of the images: computing the"
            " hypotheses again; if the images have not changed, set HYPOTHESIS.FILE to this file instead",
            legacy,
        )


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1


def build_training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Records of ``DATASETS.TRAIN`` with their ``hypothesis``; computes the hypothesis file if it is missing.

    Distillation without the text-guided loss (MaskCLIP+) needs no hypotheses: none are computed.
    """
    if not _needs_hypotheses(cfg):
        records = unlabelled_records(cfg.DATASETS.TRAIN)
        logger.info("%d training images, without hypotheses: no loss needs them", len(records))
        return records
    maker = _Maker(cfg, TrainingImages.of(cfg, digest=cfg.HYPOTHESIS.METHOD != "imported"))
    records = maker.images.records
    header, path = maker.header, maker.path
    _announce_legacy_file(path, header, records)
    if header.method == "dense":
        lines = load_or_make(path, header, len(records), maker.make_dense)
    else:
        lines = load_or_generate(path, header, records, maker.generator)
    ids = [record["image_id"] for record in records]
    threshold = cfg.HYPOTHESIS.THRESHOLD
    if wanted := cfg.HYPOTHESIS.CLASSES_PER_IMAGE:
        threshold = find_threshold(lines, header, ids, wanted, cfg.HYPOTHESIS.CALIBRATED)
        logger.info("HYPOTHESIS.CLASSES_PER_IMAGE %g: the threshold t is %.6g", wanted, threshold)
    hypotheses = hypotheses_of(lines, header, ids, threshold, cfg.HYPOTHESIS.CALIBRATED)
    for record in records:
        record["hypothesis"] = hypotheses[record["image_id"]]
        if cfg.HYPOTHESIS.CROP_AWARE:
            top1 = lines[record["image_id"]]["top1_calibrated" if cfg.HYPOTHESIS.CALIBRATED else "top1"]
            record["crop_hypothesis"] = CropHypothesis(record["image_id"], top1, threshold, cfg.HYPOTHESIS.WINDOW_RATIO)
    mean = sum(map(len, hypotheses.values())) / len(hypotheses)
    logger.info("%d training images, hypotheses of %.2f classes per image (%s)", len(records), mean, path)
    return records


def _needs_hypotheses(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE != "Distillation" or bool(cfg.MODEL.DISTILLATION.TEXT_WEIGHT)


def hypothesis_parts(cfg: CfgNode, images: TrainingImages) -> WorkParts | None:
    """The parts that the hypothesis file is made from: blocks of scores, or the shards of the feature store of
    ``HYPOTHESIS.METHOD dense``. None if the file exists, or is not needed. Called by all processes.

    Raises:
        ReclipError: the file can only be imported.
    """
    if not _needs_hypotheses(cfg):
        return None
    maker = _Maker(cfg, images)
    return None if comm.all_gather(maker.path.exists())[0] else maker.parts()


def make_hypothesis_part(cfg: CfgNode, part: WorkShard, images: TrainingImages | None = None) -> bool:
    """Compute a part of what the hypothesis file of ``DATASETS.TRAIN`` is made from; called by all processes of a run,
    while other runs may compute other parts.

    Args:
        images: those of the config; None to list them.

    Returns:
        Whether no part is missing any more, so that :func:`build_training_records` only has to write the file.

    Raises:
        ReclipError: the file can only be imported, or the feature store of ``HYPOTHESIS.METHOD dense`` has no room.
    """
    parts = hypothesis_parts(cfg, images or TrainingImages.of(cfg))
    if parts is None:
        return True
    if problem := parts.problem():
        raise ReclipError(f"--shard {part}: {problem}: make room, or run without --shard, which encodes images twice")
    parts.make(part)
    return not parts.missing()


class _Maker:
    """Makes the hypothesis file of ``DATASETS.TRAIN``."""

    def __init__(self, cfg: CfgNode, images: TrainingImages) -> None:
        check_classes_per_image(cfg.HYPOTHESIS.CLASSES_PER_IMAGE, len(images.class_names))
        self.cfg, self.images = cfg, images
        self.backbone = build_clip_backbone(cfg)
        digest = "" if cfg.HYPOTHESIS.METHOD == "imported" else images.digest
        self.header = hypothesis_header(cfg, self.backbone, digest, images.class_names)
        self.path = hypothesis_path(cfg, self.header)

    def _query_features(self) -> torch.Tensor:
        self.backbone.to(self.cfg.MODEL.DEVICE)
        return self.backbone.query_features(self.header.class_names, get_templates(self.header.templates))

    def generator(self) -> HypothesisGenerator:
        """Scores crops, windows or whole images."""
        features = self._query_features().to(self.cfg.MODEL.DEVICE)
        batch_size = self.cfg.HYPOTHESIS.BATCH_SIZE
        return HypothesisGenerator(self.backbone, features, *self.header.pixel_statistics, batch_size)

    def parts(self) -> WorkParts:
        """See :func:`hypothesis_parts`."""
        if self.header.method == "dense":
            limit = self.cfg.FEATURE_STORE.MAX_SIZE
            return StoreParts(self._dense_store(), limit, lambda: view_encoder(self.cfg, self.backbone))
        return HypothesisParts(self.images.records, self.header, self.path, self.generator)

    def _dense_store(self) -> FeatureStore:
        """The store of whole images that ``HYPOTHESIS.METHOD dense`` reads: the training's if it is of that kind."""
        cfg, keys, images = self.cfg, self.cfg.FEATURE_STORE, self.images
        plan = ViewPlan.from_config(cfg) if keys.KIND == WHOLE and keys.VIEWS else ViewPlan.whole_images(cfg)
        return build_store(cfg, self.backbone, images.records, plan, images.digest)

    def make_dense(self) -> None:
        """Write the hypothesis file of ``HYPOTHESIS.METHOD dense`` from a feature store. Without room for a store,
        images are encoded twice instead: for a sample of all, and for the labels of each."""
        store, encode = self._dense_store(), view_encoder(self.cfg, self.backbone)
        source = store
        if problem := budget_problem(store, self.cfg.FEATURE_STORE.MAX_SIZE):
            logger.warning("hypotheses: %s: falling back to encoding each image twice", problem)
            source = RecomputedFeatures(store.views, store.patch_size, encode)
        else:
            store.make(encode)
        if comm.is_main_process():
            query_features = self._query_features().cpu()
            lines = dense_lines(source, query_features, self.backbone.logit_scale, self.header.class_shares)
            write_hypothesis_file(self.path, self.header, lines)
