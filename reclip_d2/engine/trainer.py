"""The trainer, and building a model for evaluation."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, LRScheduler, PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from torch import nn
from torch.utils.data import DataLoader

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
import reclip_d2.modeling  # noqa: F401  (registers the models)
from reclip_d2.data.classes import check_labelled
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper, build_test_mapper
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL
from reclip_d2.data.pseudo_labels import PseudoLabels
from reclip_d2.data.sampling import NumberedDataset, build_train_loader
from reclip_d2.engine.calibration import calibrate
from reclip_d2.engine.judged_training import KeepBestJudged
from reclip_d2.engine.launch_checks import scale_to_processes
from reclip_d2.engine.logs import build_writers
from reclip_d2.engine.plateau import PlateauRule, StopAtPlateau
from reclip_d2.engine.run_setup import describe_model
from reclip_d2.engine.solver import build_lr_scheduler, build_optimizer
from reclip_d2.engine.static_step import LOG_PERIOD, build_static_step
from reclip_d2.engine.sync_batch_norm import broadcast_statistics, synchronize_on_cpu
from reclip_d2.engine.train_loop import AverageStudent, SeedIteration, TrainLoop, amp_dtype_of
from reclip_d2.engine.worker_watch import watch_workers
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.bias import build_bias_evaluators
from reclip_d2.evaluation.label_maps import LabelMapEvaluator, check_own_labels
from reclip_d2.features.held_out import HeldOutViews
from reclip_d2.features.training import fixed_views
from reclip_d2.features.whole_images import whole_images
from reclip_d2.hypothesis.training_records import build_training_records, unlabelled_records
from reclip_d2.inference import DatasetPredictor
from reclip_d2.modeling import Distillation, MaskCLIP
from reclip_d2.modeling.checkpoint import FINAL_CHECKPOINT, ReclipCheckpointer, training_resolution
from reclip_d2.modeling.meta_arch.distillation import TrainedStudent

NOTHING_TO_EVALUATE = "nothing to evaluate: set MODEL.WEIGHTS to a checkpoint, or give --resume after training"


class EndOfTraining(BaseException):
    """Leaves the loop of a training whose end was brought forward. No error, so nothing logs it as one."""


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with label-blind data, exact resume, :class:`TrainLoop` and
    :class:`ReclipCheckpointer`."""

    def __init__(
        self,
        cfg: CfgNode,
        *,
        extra_hooks: Sequence[HookBase] = (),
        evaluate: bool = True,
        keep_checkpoints: int | None = None,
    ) -> None:
        """
        Args:
            extra_hooks: called after all others, in this order.
            evaluate: evaluate on ``DATASETS.TEST`` every ``TEST.EVAL_PERIOD`` iterations and at the end.
            keep_checkpoints: number of intermediate checkpoints to keep, the last ones; None keeps all.
        """
        # Replaces DefaultTrainer.__init__, which does not accept another train loop.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        on_cpu = cfg.MODEL.DEVICE.startswith("cpu")
        amp_dtype = amp_dtype_of(cfg)
        self._trainer = TrainLoop(
            create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {})),
            self.build_train_loader(cfg, model=model),
            optimizer,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            amp_dtype=amp_dtype,
            static_step=build_static_step(cfg, model, optimizer, amp_dtype),
            # The rule of the plateau reads every loss.
            check_period=1 if cfg.SOLVER.PLATEAU.ENABLED else math.gcd(LOG_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD),
            max_iter=cfg.SOLVER.MAX_ITER,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        states = {"optimizer": optimizer}
        if self._trainer.grad_scaler.is_enabled():
            states["grad_scaler"] = self._trainer.grad_scaler
        if isinstance(model, Distillation) and model.average is not None:
            states["trained_student"] = TrainedStudent(model)
        self.checkpointer = ReclipCheckpointer(
            model, cfg.OUTPUT_DIR, resolution=training_resolution(cfg), trainer=weakref.proxy(self), **states
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self._evaluate, self._keep_checkpoints = evaluate, keep_checkpoints
        self.register_hooks([*self.build_hooks(), *extra_hooks])

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        return scale_to_processes(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return synchronize_on_cpu(describe_model(build_model(cfg)))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0, model: nn.Module | None = None) -> DataLoader:
        """The loader of ``DATASETS.TRAIN``.

        Args:
            start_iter: iterations already done.
            model: the model to train, whose frozen CLIP computes the features of ``FEATURE_STORE.VIEWS``.
        """
        watch_workers()
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        if masks := PseudoLabels.from_config(cfg):
            masks.check(cfg.DATASETS.TRAIN, [*cfg.DATASETS.TEST, CUSTOM_VAL])
        records, workers = build_training_records(cfg), cfg.DATALOADER.NUM_WORKERS
        if cfg.FEATURE_STORE.VIEWS:
            if model is None:
                raise ValueError("FEATURE_STORE.VIEWS needs the model, whose frozen CLIP computes the features")
            dataset = fixed_views(cfg, model, records)
            workers = workers if dataset.reads_pixels else 0  # memory-mapped features need no workers
        else:
            dataset = NumberedDataset(records, UnlabelledDatasetMapper(cfg, is_train=True), seed)
        return build_train_loader(
            dataset,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=workers,
            seed=seed,
            start_iter=start_iter,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        check_labelled(dataset_name)
        check_own_labels(dataset_name)
        watch_workers()
        return build_detection_test_loader(cfg, dataset_name, mapper=build_test_mapper(cfg))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        if not cfg.DATASETS.TEST:
            logging.getLogger("reclip_d2").info("DATASETS.TEST is empty: without labels there is nothing to evaluate")
        broadcast_statistics(model)
        return super().test(cfg, DatasetPredictor.from_config(model, cfg), evaluators)

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
        result = super().build_hooks()
        if not self._evaluate:
            result = [hook for hook in result if not isinstance(hook, EvalHook)]
        for hook in result:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = self._keep_checkpoints
        if "trained_student" in self.checkpointer.checkpointables:
            result.insert(0, AverageStudent())
        after_scheduler = 1 + next(index for index, hook in enumerate(result) if isinstance(hook, LRScheduler))
        # Both before the checkpoint is written; the plateau first, since it may bring the end forward.
        if self.cfg.SOLVER.JUDGE_PERIOD:
            dataset = self._trainer.data_loader.dataset
            result.insert(after_scheduler, KeepBestJudged.of(self.cfg, self.checkpointer.model, dataset))
        if self.cfg.SOLVER.PLATEAU.ENABLED:
            result.insert(after_scheduler, self.build_plateau_hook())
        return [SeedIteration(self.cfg.SEED), *result] if self.cfg.SEED >= 0 else result

    def build_plateau_hook(self) -> StopAtPlateau:
        """The hook of ``SOLVER.PLATEAU``."""
        keys = self.cfg.SOLVER.PLATEAU
        rule = PlateauRule(
            window=keys.WINDOW, patience=keys.PATIENCE, mask_change=keys.MASK_CHANGE, loss_change=keys.LOSS_CHANGE
        )
        views = HeldOutViews.of(self.cfg, self._trainer.data_loader.dataset, keys.IMAGES)
        return StopAtPlateau(
            rule, views, period=keys.PERIOD, cool_down=keys.COOL_DOWN, power=self.cfg.SOLVER.POLY_POWER
        )

    def build_writers(self) -> list[EventWriter]:
        return build_writers(self.cfg, self.max_iter)

    def end_after(self, iterations: int) -> None:
        """Bring the end of the training forward to this number of iterations."""
        self.max_iter = min(iterations, self.max_iter)
        for hook in self._hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_iter = self.max_iter
            if isinstance(hook, PeriodicWriter):
                for writer in hook._writers:
                    if isinstance(writer, CommonMetricPrinter):
                        writer._max_iter = self.max_iter

    def before_step(self) -> None:
        if self.iter >= self.max_iter:
            raise EndOfTraining
        super().before_step()

    def train(self) -> Any:
        """Train. If a run was interrupted after its last iteration, only write what is missing."""
        if self.start_iter > self.max_iter:
            raise ReclipError(
                f"the last checkpoint in {self.cfg.OUTPUT_DIR} is of iteration {self.start_iter}, after SOLVER.MAX_ITER"
                f" {self.max_iter}: raise SOLVER.MAX_ITER, or give --overwrite"
            )
        if self.start_iter == self.max_iter and not Path(self.cfg.OUTPUT_DIR, FINAL_CHECKPOINT).is_file():
            # PeriodicCheckpointer writes it after the last iteration, which was before the interruption.
            self.checkpointer.save(Path(FINAL_CHECKPOINT).stem, iteration=self.iter)
        with contextlib.suppress(EndOfTraining):
            return super().train()
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():  # as DefaultTrainer does after its loop
            verify_results(self.cfg, self._last_eval_results)
            return self._last_eval_results
        return None

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter > 0:  # draw the same images as an uninterrupted run
            model = self.checkpointer.model
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter, model))


def build_evaluation_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """The model in eval mode, with the last checkpoint (``resume``) or ``MODEL.WEIGHTS``; MaskCLIP needs neither.

    For ``Distillation``, only the student is built, since its checkpoint is self-contained.

    Raises:
        ReclipError: there is no checkpoint, or it does not fit the config.
    """
    if cfg.MODEL.META_ARCHITECTURE == "Distillation":
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = "Student"
    model = Trainer.build_model(cfg).eval()
    if isinstance(model, MaskCLIP):
        if model.calibration != "none":
            records = unlabelled_records(cfg.DATASETS.TRAIN)
            calibrate(model, whole_images(cfg, model.backbone, records, model.view_encoder))
        return model
    checkpointer = ReclipCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ReclipError(NOTHING_TO_EVALUATE)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model
