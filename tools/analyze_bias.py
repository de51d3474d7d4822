#!/usr/bin/env python
"""Measure and draw the two biases of CLIP before and after rectification: one web page, PNGs and the numbers.

    data=configs/datasets/embedded.yaml methods=configs/methods
    python tools/analyze_bias.py --config-file $data --config-file $methods/reclippp_rectify.yaml \\
        --weights output/embedded/reclippp_rectify/model_final.pth --output-dir output/bias \\
        --compare extended=$data,$methods/reclippp_ext.yaml:output/embedded/reclippp_ext/model_final.pth

MaskCLIP with the same config is always included. Labels are used only to measure; without labels, only what needs none
is drawn.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.config.files import add_config_file_argument
from reclip_d2.data.classes import check_registered, class_names_from_config, class_names_of
from reclip_d2.data.colors import class_colors
from reclip_d2.data.datasets.custom import register_custom
from reclip_d2.data.images import read_image
from reclip_d2.engine.logs import quiet_logging
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.evaluation.label_files import DatasetLabels, check_no_background
from reclip_d2.evaluation.label_maps import check_own_labels
from reclip_d2.evaluation.model_analysis import (
    ModelAnalysis,
    evaluate_bias,
    find_preference,
    is_labelled,
    look_at_scenes,
)
from reclip_d2.evaluation.preferences import spread_records
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.visualization.bias_report import (
    BiasReport,
    ReportSubject,
    Scene,
    check_output_dir,
    remove_report,
)


class NamedModel(NamedTuple):
    """One model to analyse."""

    name: str
    cfg: CfgNode
    source: str


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_file_argument(parser, " of the model of interest", required=True)
    parser.add_argument("--weights", default="", help="its checkpoint; by default the config's MODEL.WEIGHTS")
    parser.add_argument("--name", default="", help="its name in the report; by default that of the last config file")
    parser.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=CONFIG[,CONFIG...][:WEIGHTS]",
        help="further models; several config files are merged in order",
    )
    parser.add_argument("--dataset", default="", help="registered data set; by default the first of DATASETS.TEST")
    parser.add_argument("--output-dir", default="output/bias")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report in --output-dir")
    parser.add_argument("--scenes", type=int, default=4, help="scenes to draw, spread evenly over the data set")
    parser.add_argument(
        "--preference-images", type=int, default=300, help="maximum number of images for the maps of CLIP's preferences"
    )
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config overrides, for all models")
    return parser


def parse_comparison(text: str) -> tuple[str, list[str], str]:
    """``NAME=CONFIG[,CONFIG...][:WEIGHTS]`` as (name, config files, weights or "")."""
    name, equals, files = text.partition("=")
    configs, _, weights = files.partition(":")
    if not (name.strip() and equals and all(configs.split(","))):
        raise ReclipError(f"--compare {text!r}: write NAME=config.yaml:weights.pth, or NAME=config.yaml for MaskCLIP")
    return name.strip(), configs.split(","), weights


def model_config(config_files: list[str], weights: str, dataset: str, opts: list[str]) -> CfgNode:
    """Config of one model, to be analysed on ``dataset`` (default: its first of DATASETS.TEST, else of
    DATASETS.TRAIN)."""
    cfg = load_config(config_files, opts)
    own = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    if not (dataset or own):
        raise ReclipError(f"config file {', '.join(config_files)} names no data set: give one with --dataset")
    cfg.DATASETS.TEST = (dataset or own[0],)
    register_custom(cfg)
    check_registered(cfg.DATASETS.TEST[0])
    check_registered_parts(cfg)
    if weights:
        cfg.MODEL.WEIGHTS = weights
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.TEST.LABEL_MAPS = True
    return cfg


def maskclip_config(cfg: CfgNode) -> CfgNode:
    """Plain MaskCLIP, without options and controls, with the CLIP and the inputs of another config."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "MaskCLIP"
    cfg.MODEL.MASKCLIP = load_config("").MODEL.MASKCLIP
    cfg.MODEL.CLIP.LEARNABLE_QUERY = cfg.MODEL.CLIP.FINE_TUNE = False  # what training changes
    return cfg


def list_models(args: argparse.Namespace) -> list[NamedModel]:
    """MaskCLIP, the models to compare, and last the model of interest."""
    main = model_config(args.config_file, args.weights, args.dataset, args.opts)
    dataset = main.DATASETS.TEST[0]
    maskclip = maskclip_config(main)
    models = [NamedModel("MaskCLIP", maskclip, f"{', '.join(args.config_file)}, CLIP's own segmentation")]
    for text in args.compare:
        name, config_files, weights = parse_comparison(text)
        cfg = model_config(config_files, weights, dataset, args.opts)
        models.append(NamedModel(name, cfg, source_of(config_files, cfg)))
    if main.MODEL.META_ARCHITECTURE != "MaskCLIP" or main.MODEL.MASKCLIP != maskclip.MODEL.MASKCLIP:
        name = args.name or Path(args.config_file[-1]).stem
        models.append(NamedModel(name, main, source_of(args.config_file, main)))
    names = [model.name for model in models]
    check_checkpoints(models)
    for name in names:
        if names.count(name) > 1:
            raise ReclipError(f"two models are named {name!r}: choose another name (--name, or NAME= in --compare)")
    for model in models:
        if class_names_from_config(model.cfg) != class_names_of(dataset):
            raise ReclipError(f"{model.name} has another class list than data set {dataset!r}")
    return models


def source_of(config_files: list[str], cfg: CfgNode) -> str:
    """Config files and checkpoint of a model, for the report."""
    return ", ".join(filter(None, (*config_files, cfg.MODEL.WEIGHTS)))


def check_checkpoints(models: list[NamedModel]) -> None:
    """Raise :class:`ReclipError` for a model without its checkpoint, before the first one is evaluated."""
    for model in models:
        weights = model.cfg.MODEL.WEIGHTS
        if model.cfg.MODEL.META_ARCHITECTURE == "MaskCLIP":
            continue
        if not weights:
            raise ReclipError(f"{model.name} has no checkpoint: give --weights, or NAME=config.yaml:weights.pth")
        if "://" not in weights and not Path(weights).is_file():
            raise ReclipError(f"checkpoint {weights} of {model.name} does not exist")


def load_scenes(dataset: str, count: int, labelled: bool) -> tuple[list[dict], list[Scene]]:
    """Records and pixels of the scenes to draw."""
    records = spread_records(DatasetCatalog.get(dataset), count)
    labels = DatasetLabels(dataset)
    scenes = []
    for record in records:
        image = read_image(record["file_name"])
        truth = None
        if labelled:
            truth = labels.read(record, image.shape[:2]).astype(np.int64)
        scenes.append(Scene(str(record.get("image_id", Path(record["file_name"]).stem)), image, truth))
    return records, scenes


def describe_subject(cfg: CfgNode, scenes: list[Scene], labelled: bool) -> ReportSubject:
    """The subject of the report."""
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    names = [names[0] for names in class_names_of(dataset)]
    colors = metadata.get("stuff_colors") or class_colors(len(names))
    return ReportSubject(
        dataset=dataset,
        protocol=metadata.get("reclip_protocol", f"{dataset}, label {metadata.get('ignore_label', 255)} ignored"),
        images=len(DatasetCatalog.get(dataset)),
        class_names=names,
        colors=np.array(colors, dtype=np.uint8),
        ignore_label=metadata.get("ignore_label", 255),
        labelled=labelled,
        bin_width=cfg.TEST.BIAS.BIN_WIDTH,
        min_object_area=cfg.TEST.BIAS.MIN_OBJECT_AREA,
        min_bin_objects=cfg.TEST.BIAS.MIN_BIN_OBJECTS,
        scenes=scenes,
    )


def analyze(model: NamedModel, bias: CfgNode, records: list[dict], labelled: bool, max_images: int) -> ModelAnalysis:
    """Measurements of one model, which is freed afterwards."""
    dataset = model.cfg.DATASETS.TEST[0]
    analysis = ModelAnalysis(model.name, model.source)
    network = build_evaluation_model(model.cfg, resume=False)
    if labelled:
        evaluate_bias(model.cfg, network, dataset, bias, analysis)
    analysis.preference = find_preference(model.cfg, network, DatasetCatalog.get(dataset), max_images)
    look_at_scenes(model.cfg, network, records, analysis)
    return analysis


@exit_on_error
def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    args = argument_parser().parse_args(arguments)
    if args.scenes < 0 or args.preference_images < 1:
        raise ReclipError("--scenes must be 0 or above, --preference-images above 0")
    args.output_dir = check_output_folder(args.output_dir, "--output-dir")
    models = list_models(args)
    main_cfg = models[-1].cfg
    dataset = main_cfg.DATASETS.TEST[0]
    if not DatasetCatalog.get(dataset):
        raise ReclipError(f"data set {dataset!r} has no images: check its folder")
    check_output_dir(args.output_dir, args.overwrite)
    quiet_logging(args.output_dir)
    labelled = is_labelled(dataset)
    if labelled:
        check_no_background(dataset, "this report")
        check_own_labels(dataset)
    else:
        print(f"{dataset} has no labels: skipping scores, Fig. 1 and IoU per class")
    records, scenes = load_scenes(dataset, args.scenes, labelled)
    analyses = []
    for model in models:
        print(f"{model.name} on {dataset}")
        analyses.append(analyze(model, main_cfg.TEST.BIAS, records, labelled, args.preference_images))
        if labelled:
            results = analyses[-1].results
            space = results["space_preference"]
            print(
                f"  mIoU {results['sem_seg']['mIoU']:.1f} %, class preference"
                f" {results['class_preference']['score']:.3f}, space preference {space['score']:.2f} ±"
                f" {space['standard_error']:.2f} ({space['objects']:.0f} objects)"
            )
    remove_report(args.output_dir)
    page = BiasReport(args.output_dir, describe_subject(main_cfg, scenes, labelled), analyses).write()
    print(f"Written: {page}, with PNGs and bias.json next to it")


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
