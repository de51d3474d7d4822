#!/usr/bin/env python
"""How much a model's masks change when its classes are called by synonyms: agreement, and mIoU where there are labels.

    data=configs/datasets/embedded.yaml methods=configs/methods
    python tools/synonym_report.py --synonyms words.txt --config-file $data --config-file $methods/maskclip.yaml

``words.txt`` is a class file with one line for each class of the model, whose names are the synonyms to try: each
alone, then all first ones at once, all second ones, and so on. Only the Query features W_q change; what a model has
learned stays. Images are those of DATASETS.TEST, or of DATASETS.TRAIN if it is empty; agreement needs no labels.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from reclip_d2.backbones.query import check_names_fit
from reclip_d2.config.files import add_config_file_argument
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.images import read_image
from reclip_d2.engine import program
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.evaluation.synonyms import (
    Agreement,
    Variant,
    VariantResult,
    count_labelled,
    own_names,
    rename_queries,
    synonym_variants,
    table_lines,
)
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.progress import count_steps


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_file_argument(parser)
    parser.add_argument("--synonyms", required=True, metavar="FILE", help="class file: one line for each class")
    parser.add_argument("--images", type=int, default=100, help="images to predict, evenly spaced; 0 for all")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers, with those of each class, as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def chosen_records(cfg: CfgNode, count: int) -> tuple[str, list[dict[str, Any]]]:
    """The data set, and ``count`` of its records, evenly spaced; 0 for all."""
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    if not names:
        raise ReclipError("DATASETS.TEST and DATASETS.TRAIN are empty: name a registered data set")
    program.check_images(names[0])
    records = DatasetCatalog.get(names[0])
    stride = max(1, len(records) // count) if count else 1
    return names[0], records[::stride][: count or None]


class Report:
    """Predicts a data set's images under each variant of the names."""

    def __init__(self, cfg: CfgNode, dataset: str, records: Sequence[dict[str, Any]]) -> None:
        self.records = records
        self.model = build_evaluation_model(cfg, resume=False)
        self.predictor = ImagePredictor.from_config(self.model, cfg).without_unsupported_classes(cfg)
        labelled = all("sem_seg_file_name" in record for record in records)
        self.labels = DatasetLabels(dataset) if labelled else None

    @torch.no_grad()
    def predictions(self, variant: Variant) -> Iterator[np.ndarray]:
        """Label maps ``(H, W)`` of the images, in the model's class ids."""
        rename_queries(self.model, variant.names)
        for record in self.records:
            yield self.predictor.labels(read_image(record["file_name"]), record["file_name"])

    def compare(self, variant: Variant, before: Sequence[np.ndarray]) -> VariantResult:
        """Predict under other names.

        Args:
            before: predictions under the model's own names.
        """
        count = None if self.labels is None else self.labels.num_classes
        result = VariantResult(
            variant,
            Agreement(self.model.num_classes),
            None if count is None else np.zeros((count, count + 1), np.int64),
        )
        for record, own, prediction in zip(self.records, before, self.predictions(variant), strict=True):
            result.agreement.add(own, prediction)
            if self.labels is not None:
                truth = self.labels.read(record, prediction.shape)
                predicted = self.labels.predicted_ids(prediction)
                count_labelled(result.confusion, truth, predicted, self.labels.ignore_label)
        return result


def as_json(result: VariantResult, names: Sequence[str]) -> dict[str, Any]:
    """A result's numbers, in percent; null for classes in neither prediction."""
    ious = {name: None if np.isnan(iou) else iou for name, iou in zip(names, result.agreement.class_ious, strict=True)}
    agreement = {"same_label": result.agreement.pixels, "mean_iou": result.agreement.mean_iou, "iou": ious}
    return {"names": [", ".join(names) for names in result.variant.names], **agreement, "labelled_mIoU": result.miou}


@exit_on_error
def main(args: argparse.Namespace) -> str:
    """Predict under all variants; returns the table."""
    if args.images < 0:
        raise ReclipError(f"--images {args.images}: give a number above 0, or 0 for all")
    logging.getLogger("reclip_d2").setLevel(logging.WARNING)
    cfg = program.run_config(argparse.Namespace(config_file=args.config_file, opts=args.opts))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    synonyms = read_class_file(args.synonyms, "--synonyms")
    check_names_fit(synonyms, cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
    dataset, records = chosen_records(cfg, args.images)
    report = Report(cfg, dataset, records)
    own = own_names(report.model)
    variants = synonym_variants(own.names, synonyms)
    before = list(report.predictions(own))
    baseline = report.compare(own, before)
    results = []
    with count_steps("synonyms", len(variants), unit="list") as steps:
        for variant in variants:
            results.append(report.compare(variant, before))
            steps.advance()
    table = "\n".join(table_lines(results, baseline.miou)) + "\n"
    if args.output:
        names = [names[0] for names in own.names]
        content = {
            "dataset": dataset,
            "images": len(records),
            "own": as_json(baseline, names),
            "variants": {result.variant.title: as_json(result, names) for result in results},
        }
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table, end="")
    return table


if __name__ == "__main__":
    main(argument_parser().parse_args())
