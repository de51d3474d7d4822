"""Train and evaluate in this process, with the trainer of ``train_net.py``.

Training reads no labels here; linear probing, which does, is in ``tools``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import detectron2
import numpy as np
import open_clip
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.env import seed_all_rng
from torch import nn

import reclip_d2
from reclip_d2.config import load_config
from reclip_d2.engine.logs import logging_to
from reclip_d2.engine.trainer import Trainer, build_evaluation_model
from reclip_d2.evaluation.label_evaluator import plain_json
from reclip_d2.experiments.plan import Job
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.bank import build_bank
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.utils.io import atomic_write

BANK = "bank.safetensors"
BIAS_SCORES = ("class_preference", "space_preference")


class Evaluated(NamedTuple):
    """A model without training, or trained before."""

    scores: dict[str, Any]
    """``{"mIoU": ..., "IoU": {class: ...}}`` in percent, and the results of the bias evaluators."""
    model: nn.Module
    seconds: float


class Trained(NamedTuple):
    """A trained model, in eval mode."""

    model: nn.Module
    seconds: float
    """Seconds of the iterations only, since the start or resume."""
    first_iteration: int
    """0, or the iteration at which an interrupted run resumed."""


def scores_of(results: dict[str, Any]) -> dict[str, Any]:
    """Scores of ``Trainer.test``'s results on one data set: see :class:`Evaluated`."""
    values = results["sem_seg"]
    scores = {
        "mIoU": float(values["mIoU"]),
        "IoU": {key[4:]: float(value) for key, value in values.items() if key.startswith("IoU-")},
    }
    return {**scores, **{name: dict(results[name]) for name in BIAS_SCORES if name in results}}


def evaluate(cfg: CfgNode, model: nn.Module | None = None) -> Evaluated:
    """Evaluate on the data set of ``DATASETS.TEST``.

    Args:
        model: the model in eval mode; None for MaskCLIP, or for the checkpoint of ``MODEL.WEIGHTS``.
    """
    start = time.perf_counter()
    model = build_evaluation_model(cfg, resume=False) if model is None else model
    scores = scores_of(Trainer.test(cfg, model))
    return Evaluated(scores, model, time.perf_counter() - start)


def with_bank(cfg: CfgNode, model: nn.Module) -> CfgNode:
    """The config with a bank of the model's own for ``TEST.REFINE bank``, if ``TEST.BANK.FILE`` names none.

    It is made from the unlabelled training images, as by ``tools/build_bank.py``, in the run's folder.
    """
    if "bank" not in cfg.TEST.REFINE or cfg.TEST.BANK.FILE:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    refine, cfg.TEST.REFINE = cfg.TEST.REFINE, []
    bank = build_bank(cfg, ImagePredictor.from_config(model, cfg), unlabelled_records(cfg.DATASETS.TRAIN))
    cfg.TEST.REFINE, cfg.TEST.BANK.FILE = refine, str(Path(cfg.OUTPUT_DIR) / BANK)
    bank.save(Path(cfg.TEST.BANK.FILE))
    return cfg


def train(cfg: CfgNode, resume: bool = False, trainer_class: type[Trainer] = Trainer) -> Trained:
    """Train to the end without evaluating; keeps only the last intermediate checkpoint.

    Args:
        resume: continue from the last checkpoint in ``OUTPUT_DIR`` if there is one.
    """
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    trainer = trainer_class(cfg, evaluate=False, keep_checkpoints=1)
    trainer.resume_or_load(resume=resume)
    first, start = trainer.start_iter, time.perf_counter()
    trainer.train()
    return Trained(trainer.checkpointer.model.eval(), time.perf_counter() - start, first)


def perform(job: Job) -> dict[str, Any]:
    """Train and evaluate, or finish an interrupted run; logs go to ``log.txt`` in the run's folder.

    Returns:
        See :func:`result_of`.
    """
    with logging_to(job.folder):
        cfg = load_config(job.config_files, job.options)
        check_registered_parts(cfg)
        if job.kind == "evaluate":
            model = build_evaluation_model(cfg, resume=False)
            return result_of(cfg, evaluate(with_bank(cfg, model), model).scores, None)
        trained = train(cfg, resume=True)
        return result_of(cfg, evaluate(cfg, trained.model).scores, training_of(cfg, trained))


def result_of(
    cfg: CfgNode, scores: dict[str, Any], training: dict[str, Any] | None, supervision: str = "none"
) -> dict[str, Any]:
    """The result of a run, JSON-serialisable; also writes the config to the run's folder.

    Args:
        scores: see :class:`Evaluated`.
        training: see :func:`training_of`; None without training.
        supervision: what it was trained with in addition to images and class names.

    Returns:
        ``metrics``, ``training``, ``dataset``, ``protocol``, ``supervision``, ``versions``, ``machine``.
    """
    with atomic_write(Path(cfg.OUTPUT_DIR) / "config.yaml") as temporary:
        temporary.write_text(cfg.dump(), encoding="utf-8")
    dataset = cfg.DATASETS.TEST[0]
    return plain_json(
        {
            "dataset": dataset,
            "protocol": MetadataCatalog.get(dataset).get("reclip_protocol", ""),
            "supervision": supervision,
            "metrics": scores,
            "training": training,
            "versions": versions(),
            "machine": machine(cfg.MODEL.DEVICE),
        }
    )


def training_of(cfg: CfgNode, trained: Trained) -> dict[str, Any]:
    """Summary of a training; the loss is the last in its log, a median over 20 iterations."""
    losses = [math.nan]
    metrics = Path(cfg.OUTPUT_DIR) / "metrics.json"
    if metrics.exists():
        for line in metrics.read_text(errors="replace").splitlines():
            # A killed run may leave a truncated line, to which the next run appends.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                losses.append(json.loads(line)["total_loss"])
    return {
        "iterations": cfg.SOLVER.MAX_ITER,
        "first_iteration": trained.first_iteration,
        "seconds": trained.seconds,
        "total_loss": losses[-1],
    }


def versions() -> dict[str, str]:
    """Versions by name, Python's first."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "detectron2": detectron2.__version__,
        "numpy": np.__version__,
        "reclip_d2": reclip_d2.__version__,
    }


def machine(device: str) -> str:
    """Description of the machine, with the GPU if ``device`` is one."""
    words = f"{os.cpu_count()} CPU cores ({_cpu_name()})"
    return f"{words}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else words


def _cpu_name() -> str:
    """Model of the CPU, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()
