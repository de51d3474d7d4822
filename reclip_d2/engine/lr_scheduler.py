"""The poly learning-rate schedule, with Detectron2's warm-up."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_d2_lr_scheduler
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """``WarmupPolyLR``: ``lr = BASE_LR * (1 - iter / MAX_ITER) ** POLY_POWER`` after an optional warm-up; any other
    name is Detectron2's."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_d2_lr_scheduler(cfg, optimizer)
    scheduler = PolynomialDecayParamScheduler(base_value=1.0, power=cfg.SOLVER.POLY_POWER)
    if cfg.SOLVER.WARMUP_ITERS > 0:
        length = min(cfg.SOLVER.WARMUP_ITERS / cfg.SOLVER.MAX_ITER, 1.0)
        scheduler = WarmupParamScheduler(scheduler, cfg.SOLVER.WARMUP_FACTOR, length, cfg.SOLVER.WARMUP_METHOD)
    return LRMultiplier(optimizer, multiplier=scheduler, max_iter=cfg.SOLVER.MAX_ITER)
