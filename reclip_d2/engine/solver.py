"""The optimizer (the papers' SGD, or AdamW) and the poly learning-rate schedule with Detectron2's warm-up."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_d2_lr_scheduler
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build ``SOLVER.OPTIMIZER`` for the parameters that need a gradient, with Detectron2's other ``SOLVER`` keys.

    AdamW ignores ``MOMENTUM``; gradient clipping is Detectron2's (``SOLVER.CLIP_GRADIENTS``) for both. On a GPU the
    fused implementation is used: an update is a single launch.
    """
    optimizer = build_sgd(cfg, model) if cfg.SOLVER.OPTIMIZER == "SGD" else _build_adamw(cfg, model)
    if all(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"]):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW(parameters, lr=cfg.SOLVER.BASE_LR))


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Build ``SOLVER.LR_SCHEDULER_NAME``: one of Detectron2's, or ``WarmupPolyLR``, which is
    ``lr = BASE_LR * (1 - iter / MAX_ITER) ** POLY_POWER`` after an optional warm-up."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_d2_lr_scheduler(cfg, optimizer)
    scheduler = PolynomialDecayParamScheduler(base_value=1.0, power=cfg.SOLVER.POLY_POWER)
    if cfg.SOLVER.WARMUP_ITERS > 0:
        length = min(cfg.SOLVER.WARMUP_ITERS / cfg.SOLVER.MAX_ITER, 1.0)
        scheduler = WarmupParamScheduler(scheduler, cfg.SOLVER.WARMUP_FACTOR, length, cfg.SOLVER.WARMUP_METHOD)
    return LRMultiplier(optimizer, multiplier=scheduler, max_iter=cfg.SOLVER.MAX_ITER)
