"""The optimizer: the papers' SGD, or AdamW."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over the parameters that need a gradient, with Detectron2's other ``SOLVER`` keys.

    For AdamW ``MOMENTUM`` does not apply, and gradient clipping is Detectron2's (``SOLVER.CLIP_GRADIENTS``).
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW(parameters, lr=cfg.SOLVER.BASE_LR))
