"""Trainer hooks."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm


class SeedIteration(HookBase):
    """Seed PyTorch's generators before every iteration by (seed, process, iteration).

    The Gumbel noise of an iteration is then the same whether the run was stopped before it or not.
    """

    def __init__(self, seed: int) -> None:
        """
        Args:
            seed: non-negative.
        """
        self.seed = seed

    def before_step(self) -> None:
        state = np.random.SeedSequence([self.seed, comm.get_rank(), self.trainer.iter]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]) >> 1)
