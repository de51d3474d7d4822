"""How long to train on a user's images."""

from __future__ import annotations

import math

from detectron2.config import CfgNode

EPOCHS = 200
"""The papers' on VOC, their smallest data set."""
FEWEST_ITERATIONS = 200
"""As on the embedded worlds: fewer leave the learnt bias close to its start, however few the images are."""


def suggested_iterations(images: int, cfg: CfgNode) -> int:
    """Iterations for a number of images: the papers' epochs, but not under :data:`FEWEST_ITERATIONS`, and at most the
    config's ``SOLVER.MAX_ITER``."""
    epochs = math.ceil(EPOCHS * images / cfg.SOLVER.IMS_PER_BATCH)
    return min(cfg.SOLVER.MAX_ITER, max(FEWEST_ITERATIONS, epochs))
