#!/usr/bin/env python
"""Train and evaluate ReCLIP++ and its baselines.

    python train_net.py --config-file configs/embedded/reclippp_rectify.yaml
    python train_net.py --config-file configs/embedded/maskclip.yaml --eval-only

The data flow: ``reclip_d2.data.training_records`` lists images without labels and attaches their hypotheses (Eq. 6),
``UnlabelledDatasetMapper`` makes crops of them, ``reclip_d2.modeling.RectifiedCLIP`` (Eqs. 1 to 7) gives losses, and
Detectron2's trainer, evaluator and checkpoints do what they always do.
"""

from __future__ import annotations

import argparse
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.utils.data import DataLoader

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
import reclip_d2.modeling  # noqa: F401  (registers the models)
from reclip_d2.config import load_config
from reclip_d2.data.classes import check_labelled
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.sampling import build_train_loader
from reclip_d2.data.training_records import build_training_records, unlabelled_records
from reclip_d2.engine.calibration import calibrate
from reclip_d2.engine.checkpoint import ReclipCheckpointer
from reclip_d2.engine.hooks import SeedIteration
from reclip_d2.engine.logs import UserErrorFilter
from reclip_d2.engine.lr_scheduler import build_lr_scheduler
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.modeling import MaskCLIP
from reclip_d2.modeling.build import check_registered_parts


class Trainer(DefaultTrainer):
    """Detectron2's trainer with label-blind data, resumable sampling and our checkpoints."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0) -> DataLoader:
        return build_train_loader(
            build_training_records(cfg),
            UnlabelledDatasetMapper(cfg, is_train=True),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            start_iter=start_iter,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        check_labelled(dataset_name)
        return build_detection_test_loader(cfg, dataset_name, mapper=UnlabelledDatasetMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> LabelMapEvaluator:
        return LabelMapEvaluator(dataset_name, distributed=True, output_dir=None)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)

    def build_hooks(self) -> list[HookBase]:
        # The hooks below save through self.checkpointer: put ours in its place first.
        self.checkpointer = ReclipCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            optimizer=self._trainer.optimizer,
        )
        hooks = super().build_hooks()
        return [SeedIteration(self.cfg.SEED), *hooks] if self.cfg.SEED >= 0 else hooks

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter > 0:  # go on with the images that an unbroken run would have drawn
            loader = self.build_train_loader(self.cfg, self.start_iter)
            if hasattr(self._trainer, "reset_data_loader"):
                self._trainer.reset_data_loader(lambda: loader)
            else:
                self._trainer.data_loader, self._trainer._data_loader_iter = loader, iter(loader)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and ``--overwrite``."""
    parser = default_argument_parser()
    parser.add_argument("--overwrite", action="store_true", help="train anew in an OUTPUT_DIR that holds a run")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Config of the command line, frozen; logging and seeds set up."""
    cfg = load_config(args.config_file, args.opts)
    check_registered_parts(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger("reclip_d2").warning(
            "MODEL.DEVICE is %s, but there is no GPU: using the CPU", cfg.MODEL.DEVICE
        )
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="reclip_d2", abbrev_name="reclip_d2")
    logging.getLogger("detectron2.engine.train_loop").addFilter(UserErrorFilter())
    return cfg


def build_evaluation_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """The model in eval mode with the last checkpoint (``resume``) or ``MODEL.WEIGHTS``; MaskCLIP needs neither."""
    model = Trainer.build_model(cfg).eval()
    if isinstance(model, MaskCLIP):
        if model.calibration != "none":
            calibrate(model, unlabelled_records(cfg.DATASETS.TRAIN), UnlabelledDatasetMapper(cfg, is_train=False))
        return model
    checkpointer = ReclipCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ReclipError("nothing to evaluate: name a checkpoint, MODEL.WEIGHTS FILE, or give --resume after training")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


@exit_on_error
def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``."""
    cfg = setup(args)
    if args.eval_only:
        return Trainer.test(cfg, build_evaluation_model(cfg, args.resume))
    if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP":
        raise ReclipError("MaskCLIP has nothing to train: add --eval-only")
    if not (args.resume or args.overwrite) and ReclipCheckpointer(None, cfg.OUTPUT_DIR).has_checkpoint():
        raise ReclipError(f"{cfg.OUTPUT_DIR} holds a trained run: add --resume, --overwrite, or another OUTPUT_DIR")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run_program(main: Callable[[argparse.Namespace], Any]) -> None:
    """Call ``main`` with the command line's arguments, in as many processes as they ask for."""
    args = argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    run_program(main)
