#!/usr/bin/env python
"""Train and evaluate ReCLIP++ and its baselines.

    python train_net.py --config-file configs/embedded/reclippp_rectify.yaml
    python train_net.py --config-file configs/embedded/maskclip.yaml --eval-only
    python -m reclip_d2.train_net ...      # the same, where the package is installed without its checkout

The data flow: ``reclip_d2.hypothesis.training_records`` lists images without labels and attaches their hypotheses
(Eq. 6), ``UnlabelledDatasetMapper`` makes crops of them, ``reclip_d2.modeling.RectifiedCLIP`` (Eqs. 1 to 7) gives
losses, and Detectron2's trainer, evaluator and checkpoints do what they always do.
"""

from __future__ import annotations

import argparse
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reclip_d2  # noqa: F401  isort: skip  (before the libraries whose messages it filters)
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    create_ddp_model,
    default_argument_parser,
    launch,
)
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.utils.data import DataLoader

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
import reclip_d2.modeling  # noqa: F401  (registers the models)
from reclip_d2.config import load_config
from reclip_d2.data.classes import check_labelled
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.datasets.custom import register_custom
from reclip_d2.data.sampling import build_train_loader
from reclip_d2.engine.calibration import calibrate
from reclip_d2.engine.checkpoint import FINAL_CHECKPOINT, ReclipCheckpointer, forget_run, run_lock, training_resolution
from reclip_d2.engine.hooks import SeedIteration
from reclip_d2.engine.launch_checks import check_config_for, check_processes, scale_to_processes
from reclip_d2.engine.lr_scheduler import build_lr_scheduler
from reclip_d2.engine.optimizer import build_optimizer
from reclip_d2.engine.run_setup import describe_model, set_up_run
from reclip_d2.engine.sync_batch_norm import broadcast_statistics, synchronize_on_cpu
from reclip_d2.engine.train_loop import TrainLoop, amp_dtype_of
from reclip_d2.engine.training_settings import TrainingSettings
from reclip_d2.engine.worker_watch import watch_workers
from reclip_d2.engine.writers import build_writers
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.evaluation.bias import build_bias_evaluators
from reclip_d2.evaluation.label_check import check_own_labels
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.hypothesis.training_records import build_training_records, unlabelled_records
from reclip_d2.modeling import MaskCLIP
from reclip_d2.modeling.build import check_registered_parts

INTERRUPTED = "interrupted: a training goes on from its last checkpoint with --resume"


class Trainer(DefaultTrainer):
    """Detectron2's trainer with label-blind data, resumable sampling, and a train loop and checkpoints of our own."""

    def __init__(self, cfg: CfgNode) -> None:
        # As DefaultTrainer's, which has no place for another train loop: its own __init__ is left out.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        on_cpu = cfg.MODEL.DEVICE.startswith("cpu")
        self._trainer = TrainLoop(
            create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {})),
            self.build_train_loader(cfg),
            optimizer,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            amp_dtype=amp_dtype_of(cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        states = {"optimizer": optimizer}
        if self._trainer.grad_scaler.is_enabled():
            states["grad_scaler"] = self._trainer.grad_scaler
        self.checkpointer = ReclipCheckpointer(
            model, cfg.OUTPUT_DIR, resolution=training_resolution(cfg), trainer=weakref.proxy(self), **states
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        return scale_to_processes(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return synchronize_on_cpu(describe_model(build_model(cfg)))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0) -> DataLoader:
        watch_workers()
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
        check_own_labels(dataset_name)
        watch_workers()
        return build_detection_test_loader(cfg, dataset_name, mapper=UnlabelledDatasetMapper(cfg, is_train=False))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        if not cfg.DATASETS.TEST:
            logging.getLogger("reclip_d2").info("DATASETS.TEST is empty: without labels there is nothing to evaluate")
        broadcast_statistics(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        evaluator = LabelMapEvaluator(dataset_name, distributed=True, output_dir=None)
        return DatasetEvaluators([evaluator, *build_bias_evaluators(cfg, dataset_name)])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        return [SeedIteration(self.cfg.SEED), *hooks] if self.cfg.SEED >= 0 else hooks

    def build_writers(self) -> list[EventWriter]:
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> Any:
        """Train; of a run that was stopped after its last iteration, and before its end, write what is missing."""
        if self.start_iter > self.max_iter:
            raise ReclipError(
                f"the last checkpoint in {self.cfg.OUTPUT_DIR} is of iteration {self.start_iter}, after SOLVER.MAX_ITER"
                f" {self.max_iter}: raise that, or give --overwrite"
            )
        if self.start_iter == self.max_iter and not Path(self.cfg.OUTPUT_DIR, FINAL_CHECKPOINT).is_file():
            # As Detectron2's PeriodicCheckpointer, whose turn comes after an iteration: here there is none.
            self.checkpointer.save(Path(FINAL_CHECKPOINT).stem, iteration=self.iter)
        return super().train()

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter > 0:  # go on with the images that an unbroken run would have drawn
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter))


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and ``--overwrite``."""
    parser = default_argument_parser()
    parser.add_argument("--overwrite", action="store_true", help="train anew in an OUTPUT_DIR that holds a run")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Config of the command line, frozen; logging and seeds set up."""
    cfg = load_config(args.config_file, args.opts)
    register_custom(cfg)
    check_registered_parts(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger("reclip_d2").warning(
            "MODEL.DEVICE is %s, but there is no GPU: using the CPU", cfg.MODEL.DEVICE
        )
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    set_up_run(cfg, args)
    return cfg


def build_evaluation_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """The model in eval mode with the last checkpoint (``resume``) or ``MODEL.WEIGHTS``; MaskCLIP needs neither.

    Of ``Distillation`` only the student is built: its checkpoint is complete.
    """
    if cfg.MODEL.META_ARCHITECTURE == "Distillation":
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = "Student"
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


@exit_on_error(interrupted=INTERRUPTED)
def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``."""
    if args.eval_only:
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
    """Config of the command line, for a training.

    Raises:
        ReclipError: there is nothing to train.
    """
    cfg = load_config(args.config_file, args.opts)
    check_registered_parts(cfg)
    check_config_for(cfg, comm.get_world_size())
    if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP":
        raise ReclipError("MaskCLIP has nothing to train: add --eval-only")
    if cfg.MODEL.META_ARCHITECTURE == "Student":
        raise ReclipError("a student trains with its teacher: set MODEL.META_ARCHITECTURE Distillation")
    return cfg


def check_run(cfg: CfgNode, args: argparse.Namespace) -> bool:
    """Whether the training goes on with a run in ``OUTPUT_DIR``; nothing is touched before.

    Raises:
        ReclipError: a run is in the way, or it was begun with other settings than it would go on with.
    """
    begun = ReclipCheckpointer(None, cfg.OUTPUT_DIR).has_checkpoint()
    if begun and not (args.resume or args.overwrite):
        raise ReclipError(f"{cfg.OUTPUT_DIR} holds a trained run: add --resume, --overwrite, or another OUTPUT_DIR")
    if begun and args.resume:
        TrainingSettings(cfg).check()
    return begun and args.resume


@exit_on_error(interrupted=INTERRUPTED)  # of the processes that it starts each says its line itself
def run_program(main: Callable[[argparse.Namespace], Any]) -> None:
    """Call ``main`` with the command line's arguments, in as many processes as they ask for."""
    args = argument_parser().parse_args()
    check_config_for(load_config(args.config_file, args.opts), check_processes(args))
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
