"""The training loop, with mixed precision, gradient accumulation and a seed for each iteration."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from reclip_d2.engine.static_step import StaticStep
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]


class TrainLoop(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with ``SOLVER.AMP`` on any device and ``SOLVER.ACCUMULATE_STEPS``.

    An iteration draws one batch and makes one optimizer step, however many parts the batch is split into, so learning
    rate, checkpoints and sampling do not depend on the parts. The gradient is the sum of the parts' gradients, weighted
    by their shares of the images. It equals the whole batch's if the loss is a mean over the images (or over their
    pixels, if all images have the same size) and there is no batch norm, whose statistics are per part.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
        static_step: StaticStep | None = None,
        check_period: int = 20,
        max_iter: int = 0,
    ) -> None:
        """
        Args:
            model: maps a list of inputs to a dict of losses, in training mode.
            data_loader: infinite, yields lists of inputs.
            optimizer: of the model's parameters.
            accumulate_steps: number of parts of a batch, processed one after the other.
            amp_dtype: autocast dtype of the forward pass; for float16, gradients are scaled.
            static_step: runs the steps instead; then losses are checked and logged every ``check_period`` iterations
                and at ``max_iter``, since that waits for the GPU.
        """
        # Without the loader: older Detectron2 versions would start its workers here, before a resume replaces it.
        super().__init__(model, (), optimizer)
        self.data_loader = data_loader
        self.accumulate_steps = accumulate_steps
        self.amp_dtype = amp_dtype
        self.static_step = static_step
        self.check_period, self.max_iter = check_period, max_iter
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype is torch.float16)
        self._batches: Iterator[Batch] | None = None

    def reset_data_loader(self, data_loader_builder: Callable[[], DataLoader]) -> None:
        """Replace the data loader by a new one."""
        self.data_loader = data_loader_builder()
        self._batches = None

    def run_step(self) -> None:
        """One iteration."""
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        if self._batches is None:
            # Fork the generator, since the loader draws a seed for its workers: this iteration's noise must not change.
            with torch.random.fork_rng(devices=[]):
                self._batches = iter(self.data_loader)
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        if self.static_step is not None:
            self._run_static_step(batch, data_time)
            return

        self.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        parts = split_batch(batch, self.accumulate_steps)
        for number, part in enumerate(parts, start=1):
            share = len(part) / len(batch)
            with self._exchange_gradients(number == len(parts)):
                with torch.autocast(self.device_type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    losses = self.model(part)
                self.grad_scaler.scale(sum(losses.values()) * share).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() * share

        self._write_metrics(totals, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _run_static_step(self, batch: Batch, data_time: float) -> None:
        losses = self.static_step.run(batch)
        done = self.iter + 1
        if done % self.check_period == 0 or done == self.max_iter:  # before a checkpoint, too
            self.static_step.check()
            self._write_metrics(losses, data_time)

    def _exchange_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Average gradients over the processes once per iteration, with the last part."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()


class SeedIteration(HookBase):
    """Seed PyTorch's generators before every iteration by (seed, process, iteration).

    A resumed run then draws the same Gumbel noise as an uninterrupted one.
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


class AverageStudent(HookBase):
    """Updates the average of a student's weights after every iteration."""

    def after_step(self) -> None:
        self.trainer.checkpointer.model.update_average()


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into consecutive parts whose lengths differ by at most one.

    Raises:
        ReclipError: there are fewer images than parts.
    """
    if parts > len(batch):
        raise ReclipError(
            f"SOLVER.ACCUMULATE_STEPS {parts} exceeds the {len(batch)} images per process and iteration: lower it, or"
            " raise SOLVER.IMS_PER_BATCH"
        )
    bounds = [len(batch) * number // parts for number in range(parts + 1)]
    return [batch[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def amp_dtype_of(cfg: CfgNode) -> torch.dtype | None:
    """Autocast dtype of ``SOLVER.AMP``; None if it is off. On the CPU, bfloat16 replaces float16."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    if cfg.MODEL.DEVICE.startswith("cpu") and cfg.SOLVER.AMP.DTYPE == "float16":
        logger.info("SOLVER.AMP.DTYPE: using bfloat16 instead of float16, which is slow on CPUs")
        return torch.bfloat16
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[cfg.SOLVER.AMP.DTYPE]
