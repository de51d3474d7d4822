"""Training records: images of the data set with their hypotheses, and nothing of their labels."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from reclip_d2.clip.prompts import get_templates
from reclip_d2.clip.text import cached_query_features
from reclip_d2.data.classes import check_registered, class_names_of
from reclip_d2.data.dataset_mapper import LABEL_KEYS
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.file import HypothesisHeader, hypotheses_of
from reclip_d2.hypothesis.generate import HypothesisGenerator, load_or_generate
from reclip_d2.io import cache_dir
from reclip_d2.modeling.backbone import build_clip_backbone

logger = logging.getLogger(__name__)


def unlabelled_records(datasets: tuple[str, ...] | list[str]) -> list[dict[str, Any]]:
    """Records of registered data sets without any label entry, each with an ``image_id`` (by default its file name).

    Raises:
        ReclipError: a data set is unknown, there are no images, or two have one id.
    """
    records, seen = [], set()
    for name in datasets:
        check_registered(name)
        for record in DatasetCatalog.get(name):
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


def hypothesis_header(cfg: CfgNode, clip_fingerprint: str) -> HypothesisHeader:
    """What the hypotheses of ``DATASETS.TRAIN`` must have been made with."""
    crops = cfg.HYPOTHESIS.METHOD == "crops"
    return HypothesisHeader(
        dataset="+".join(cfg.DATASETS.TRAIN),
        class_names=class_names_of(cfg.DATASETS.TRAIN[0]),
        clip=cfg.MODEL.CLIP.NAME,
        fingerprint=clip_fingerprint,
        templates=cfg.MODEL.CLIP.TEMPLATES,
        method=cfg.HYPOTHESIS.METHOD,
        window_ratio=round(cfg.HYPOTHESIS.WINDOW_RATIO, 6) if crops else 0.0,
    )


def hypothesis_path(cfg: CfgNode, header: HypothesisHeader, records: list[dict[str, Any]]) -> Path:
    """``HYPOTHESIS.FILE``, or a file of the cache folder named by all that the hypotheses depend on."""
    if cfg.HYPOTHESIS.FILE:
        return Path(cfg.HYPOTHESIS.FILE)
    files = [(record["image_id"], record["file_name"], _size(record["file_name"])) for record in records]
    digest = hashlib.sha256(json.dumps([asdict(header), files]).encode()).hexdigest()[:16]
    return cache_dir() / "hypotheses" / f"{header.dataset}-{header.method}-{digest}.jsonl"


def _size(path: str) -> int:
    """Bytes of a file; -1 if it is missing (reading it will say so)."""
    file = Path(path)
    return file.stat().st_size if file.exists() else -1


def build_training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Records of ``DATASETS.TRAIN`` with their ``hypothesis``; the hypothesis file is made if it is missing.

    A distillation without the text-guided loss (MaskCLIP+) reads no hypotheses: none are made.
    """
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    if cfg.MODEL.META_ARCHITECTURE == "Distillation" and not cfg.MODEL.DISTILLATION.TEXT_WEIGHT:
        logger.info("%d training images, without hypotheses: no loss reads them", len(records))
        return records
    backbone = build_clip_backbone(cfg)
    header = hypothesis_header(cfg, backbone.fingerprint)

    def make_generator() -> HypothesisGenerator:
        backbone.to(cfg.MODEL.DEVICE)
        features = cached_query_features(
            backbone.text_encoder, header.class_names, get_templates(header.templates), backbone.key
        )
        return HypothesisGenerator(
            backbone,
            features.to(cfg.MODEL.DEVICE),
            cfg.MODEL.PIXEL_MEAN,
            cfg.MODEL.PIXEL_STD,
            cfg.HYPOTHESIS.BATCH_SIZE,
        )

    path = hypothesis_path(cfg, header, records)
    lines = load_or_generate(path, header, records, make_generator)
    hypotheses = hypotheses_of(
        lines, header, [r["image_id"] for r in records], cfg.HYPOTHESIS.THRESHOLD, cfg.HYPOTHESIS.CALIBRATED
    )
    for record in records:
        record["hypothesis"] = hypotheses[record["image_id"]]
        if cfg.HYPOTHESIS.CROP_AWARE:
            line = lines[record["image_id"]]
            record["window_classes"] = line["top1_calibrated" if cfg.HYPOTHESIS.CALIBRATED else "top1"]
    mean = sum(map(len, hypotheses.values())) / len(hypotheses)
    logger.info("%d training images, %.2f classes an image in their hypotheses (%s)", len(records), mean, path)
    return records
