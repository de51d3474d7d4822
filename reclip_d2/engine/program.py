"""The program ``train_net.py``: arguments, setup, and training or evaluation.

The data flow: ``reclip_d2.hypothesis.training_records`` lists images without labels and attaches their hypotheses
(Eq. 6), ``UnlabelledDatasetMapper`` crops them, ``reclip_d2.modeling.RectifiedCLIP`` (Eqs. 1 to 7) computes the losses,
and :class:`~reclip_d2.engine.trainer.Trainer` trains, evaluates and writes checkpoints.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from reclip_d2.config import load_config
from reclip_d2.config.files import add_config_file_argument
from reclip_d2.data.classes import check_registered, class_names_from_config
from reclip_d2.data.datasets.custom import register_custom
from reclip_d2.data.images import read_image
from reclip_d2.engine.launch import launch_processes
from reclip_d2.engine.launch_checks import check_config_for, check_processes
from reclip_d2.engine.output_dir import forget_run, run_lock
from reclip_d2.engine.run_setup import set_up_run
from reclip_d2.engine.trackers import check_trackers
from reclip_d2.engine.trainer import NOTHING_TO_EVALUATE, Trainer, build_evaluation_model
from reclip_d2.engine.training_settings import TrainingSettings
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.hypothesis.class_pruning import uses_evidence
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.inference.refinements import build_refinements
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.utils.files import check_regular

INTERRUPTED = "interrupted: add --resume to continue from the last checkpoint"


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, a ``--config-file`` that may be repeated, ``--num-processes`` and ``--overwrite``."""
    theirs = default_argument_parser(epilog="KEY VALUE pairs override the config files: SOLVER.BASE_LR 0.001 SEED 3")
    parser = argparse.ArgumentParser(parents=[theirs], add_help=False, conflict_handler="resolve", epilog=theirs.epilog)
    add_config_file_argument(parser)
    parser.add_argument(
        "--num-processes", type=int, default=1, metavar="N",
        help="processes on the CPU; on GPUs, give --num-gpus, or use torchrun or srun",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUTPUT_DIR")
    return parser


def run_config(args: argparse.Namespace) -> CfgNode:
    """Checked config of the command line, with its data sets registered; writes nothing."""
    cfg = load_config(args.config_file, args.opts)
    register_custom(cfg)
    check_registered_parts(cfg)
    check_trackers(cfg)
    build_refinements(cfg)  # raises for unknown names, before anything is trained
    if "bank" in cfg.TEST.REFINE:
        check_regular(cfg.TEST.BANK.FILE, "bank", "check TEST.BANK.FILE; tools/build_bank.py makes one")
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Frozen config of the command line; sets up logging and seeds."""
    cfg = run_config(args)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger("reclip_d2").warning(
            "MODEL.DEVICE is %s, but there is no GPU: using the CPU", cfg.MODEL.DEVICE
        )
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    set_up_run(cfg, args)
    return cfg


@exit_on_error(interrupted=INTERRUPTED)
def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``."""
    if args.eval_only:
        check_inputs(run_config(args), args)
        cfg = setup(args)
        return Trainer.test(cfg, build_evaluation_model(cfg, args.resume))
    cfg = trainable_config(args)
    with run_lock(cfg.OUTPUT_DIR):
        resume = check_run(cfg, args)
        cfg = setup(args)
        settings, images = TrainingSettings(cfg), [r["image_id"] for r in unlabelled_records(cfg.DATASETS.TRAIN)]
        if resume:
            settings.check_images(images)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        if args.overwrite and not args.resume:
            forget_run(cfg.OUTPUT_DIR)
        settings.write(images)
        return trainer.train()


def trainable_config(args: argparse.Namespace) -> CfgNode:
    """Config of the command line, for training.

    Raises:
        ReclipError: there is nothing to train, or an input is missing.
    """
    cfg = run_config(args)
    check_config_for(cfg, comm.get_world_size())
    if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP":
        raise ReclipError("MaskCLIP has nothing to train: add --eval-only")
    if cfg.MODEL.META_ARCHITECTURE == "Student":
        raise ReclipError("a student trains with its teacher: set MODEL.META_ARCHITECTURE Distillation")
    check_inputs(cfg, args)
    return cfg


def check_inputs(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Find missing images and checkpoints before anything is built or written.

    Raises:
        ReclipError: the data sets' class lists differ, a data set has no images, or its first image or
            ``MODEL.WEIGHTS`` is missing.
    """
    class_names_from_config(cfg)
    maskclip = cfg.MODEL.META_ARCHITECTURE == "MaskCLIP"
    calibrates = maskclip and cfg.MODEL.MASKCLIP.CALIBRATION != "none"
    looks_at_training_images = calibrates or uses_evidence(cfg)
    for name in (*(() if args.eval_only and not looks_at_training_images else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check_images(name)
    resumes = args.resume and ReclipCheckpointer(None, cfg.OUTPUT_DIR).has_checkpoint()
    if not maskclip and not resumes:
        check_weights(cfg.MODEL.WEIGHTS, needed=args.eval_only)


def check_images(dataset: str) -> None:
    """Raise :class:`ReclipError` if a data set has no images, or its first one is missing."""
    check_registered(dataset)
    records = DatasetCatalog.get(dataset)
    if not records:
        raise ReclipError(f"data set {dataset!r} has no images: check its folder")
    if not Path(records[0]["file_name"]).exists():
        read_image(records[0]["file_name"])  # raises the error


def check_weights(path: str, needed: bool) -> None:
    """Raise :class:`ReclipError` if ``MODEL.WEIGHTS`` does not exist.

    Args:
        path: value of the key.
        needed: also raise if it is empty.
    """
    if needed and not path:
        raise ReclipError(NOTHING_TO_EVALUATE)
    if path and "://" not in path:
        check_regular(path, "checkpoint", "check MODEL.WEIGHTS")


def check_run(cfg: CfgNode, args: argparse.Namespace) -> bool:
    """Whether the training resumes a run in ``OUTPUT_DIR``; writes nothing.

    Raises:
        ReclipError: the folder holds a run that would be overwritten, or that was started with other settings.
    """
    has_run = ReclipCheckpointer(None, cfg.OUTPUT_DIR).has_checkpoint()
    if has_run and not (args.resume or args.overwrite):
        raise ReclipError(f"{cfg.OUTPUT_DIR} holds a trained run: add --resume, --overwrite, or another OUTPUT_DIR")
    if has_run and args.resume:
        TrainingSettings(cfg).check()
    return has_run and args.resume


@exit_on_error(interrupted=INTERRUPTED)  # each process that it starts prints its own line
def run_program(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser | None = None) -> None:
    """Call ``main`` with the command line's arguments, in the requested number of processes.

    Args:
        parser: :func:`argument_parser` with more arguments; None for that itself.
    """
    args = (parser or argument_parser()).parse_args()
    check_config_for(load_config(args.config_file, args.opts), check_processes(args), args.num_processes > 1)
    launch_processes(main, args)
