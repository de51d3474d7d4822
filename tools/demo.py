#!/usr/bin/env python
"""The demo: MaskCLIP, the controls and ReCLIP++ on the embedded data set, in minutes on a CPU.

    python tools/demo.py --seed 0 --output-dir output/demo

Trains and evaluates with ``train_net.py``'s functions and the configs of the embedded data set; prints a table, and
writes ``report.json`` and ``report.png``. Labels are read by the evaluator, and to score the hypotheses afterwards;
training never reads them.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from reclip_d2.config import load_config
from reclip_d2.data.datasets.embedded import embedded_root
from reclip_d2.engine.logs import quiet_logging
from reclip_d2.errors import exit_on_error
from reclip_d2.evaluation.hypothesis import hypothesis_precision_recall
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.experiments import execute
from reclip_d2.hypothesis.training_records import build_training_records
from reclip_d2.toy import EMBEDDED, list_split
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.visualization.demo_picture import draw_demo

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
# Row of the table: title, key in report.json, config file, overrides.
CONTROLS = (
    ("mean filter 3x3", "3x3", ("MODEL.MASKCLIP.MEAN_FILTER", "3")),
    ("mean filter 5x5", "5x5", ("MODEL.MASKCLIP.MEAN_FILTER", "5")),
    ("mean-probability calibration, by class", "class", ("MODEL.MASKCLIP.CALIBRATION", "class")),
    (
        "mean-probability calibration, by position and class",
        "position_class",
        ("MODEL.MASKCLIP.CALIBRATION", "position_class"),
    ),
)


# On this data set an image has two views, itself and its mirror image. The feature store holds both: all that a
# training of the published configs sees.
STORE = ("FEATURE_STORE.VIEWS", "2", "FEATURE_STORE.KIND", "whole")


class Demo:
    """Runs models sequentially and keeps their table rows, scores and weights."""

    def __init__(self, seed: int, output_dir: Path, device: str, dataset: str) -> None:
        self.seed = seed
        self.output_dir = output_dir
        self.device = device
        self.dataset = dataset
        self.rows: list[tuple[str, float, float]] = []

    def config(self, name: str, *overrides: str) -> CfgNode:
        """A method's config on the embedded data set with the demo's seed, device, test set and output folder."""
        common = ("SEED", str(self.seed), "MODEL.DEVICE", self.device, "OUTPUT_DIR", str(self.output_dir / name))
        files = [str(CONFIGS / "datasets" / "embedded.yaml"), str(CONFIGS / "methods" / f"{name}.yaml")]
        return load_config(files, [*common, "DATASETS.TEST", f"('{self.dataset}',)", *overrides])

    def evaluate(self, title: str, cfg: CfgNode) -> tuple[dict[str, Any], nn.Module]:
        """Evaluate a model that needs no training; add its row."""
        scores, model, seconds = execute.evaluate(cfg)
        self.rows.append((title, scores["mIoU"], seconds))
        return scores, model

    def train(self, title: str, cfg: CfgNode) -> tuple[dict[str, Any], nn.Module]:
        """Train, then evaluate; add the row. The seconds of training exclude the evaluation."""
        trained = execute.train(cfg)
        scores = {**execute.evaluate(cfg, trained.model).scores, "train_seconds": trained.seconds}
        self.rows.append((title, scores["mIoU"], trained.seconds))
        return scores, trained.model


def hypothesis_quality(cfg: CfgNode) -> dict[str, float] | None:
    """Precision and recall of the training images' hypotheses against their labels (analysis, after the fact).

    None if the labels were deleted: nothing else needs them.
    """
    labelled = {record["image_id"]: record for record in list_split(embedded_root(EMBEDDED), "train")}
    if not all(os.path.isfile(record["sem_seg_file_name"]) for record in labelled.values()):
        return None
    records = build_training_records(cfg)
    return hypothesis_precision_recall(
        {r["image_id"]: r["hypothesis"] for r in records}, labelled, DatasetLabels("embedded_train_labelled")
    )


def print_table(rows: list[tuple[str, float, float]]) -> None:
    """Print one line per model: mIoU in percent and seconds."""
    width = max(len(title) for title, _, _ in rows)
    print(f"\n{'model':<{width}}  mIoU (%)  seconds")
    for title, miou, seconds in rows:
        print(f"{title:<{width}}  {miou:8.1f}  {seconds:7.1f}")


@exit_on_error
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the training runs")
    parser.add_argument("--output-dir", default="output/demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dataset", default="embedded_val", choices=["embedded_val", "embedded_dev"], help="where to evaluate"
    )
    args = parser.parse_args()
    args.output_dir = check_output_folder(args.output_dir, "--output-dir")
    quiet_logging(args.output_dir)
    demo = Demo(args.seed, args.output_dir, args.device, args.dataset)

    print("Training-free: MaskCLIP and the controls")
    maskclip, maskclip_model = demo.evaluate("MaskCLIP", demo.config("maskclip"))
    controls = {
        key: demo.evaluate(title, demo.config("maskclip", *overrides))[0]["mIoU"] for title, key, overrides in CONTROLS
    }

    print("Hypotheses of the training images (Eq. 6)")
    start = time.perf_counter()
    published_cfg, ext_cfg = demo.config("reclippp_rectify", *STORE), demo.config("reclippp_ext", *STORE)
    build_training_records(published_cfg)  # one file serves both configs
    hypothesis_seconds = time.perf_counter() - start

    print("Training: ReCLIP++ as published, the same without M_b, then with the extensions")
    published, published_model = demo.train("ReCLIP++ (rectified, as published)", published_cfg)
    no_bias, _ = demo.train(
        "ReCLIP++ (rectified, as published, but M = M_q)",
        demo.config(
            "reclippp_rectify",
            *STORE,
            *("MODEL.BIAS_HEAD.RECTIFICATION", "none", "OUTPUT_DIR", str(args.output_dir / "reclippp_no_bias")),
        ),
    )
    ext, ext_model = demo.train("ReCLIP++ (rectified, our extensions)", ext_cfg)

    quality, quality_ext = hypothesis_quality(published_cfg), hypothesis_quality(ext_cfg)

    report = {
        "dataset": args.dataset,
        "seed": args.seed,
        "maskclip": maskclip,
        "mean_filter": {"mIoU": max(controls["3x3"], controls["5x5"]), "3x3": controls["3x3"], "5x5": controls["5x5"]},
        "calibration": {
            "mIoU": max(controls["class"], controls["position_class"]),
            "class": controls["class"],
            "position_class": controls["position_class"],
        },
        "reclippp": published,
        "reclippp_no_bias": no_bias,
        "reclippp_ext": ext,
        "hypothesis": quality,
        "hypothesis_ext": quality_ext,
        "hypothesis_seconds": hypothesis_seconds,
    }
    with atomic_write(args.output_dir / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    draw_demo(
        args.output_dir / "report.png",
        DatasetCatalog.get(args.dataset)[:6],
        args.dataset,
        maskclip_model,
        published_model,
        ext_model,
    )
    print_table(demo.rows)
    if quality and quality_ext:
        print(
            f"\nHypotheses: precision {quality['precision']:.2f}, recall {quality['recall']:.2f}; calibrated"
            f" {quality_ext['precision']:.2f}, {quality_ext['recall']:.2f}; made in {hypothesis_seconds:.0f} s."
        )
    print(f"Written: {args.output_dir}/report.json, report.png; log.txt has the details.")


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
