"""Stop a training when its masks and its loss no longer change; no label is read (not in the papers)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from reclip_d2.features.held_out import HeldOutViews

logger = logging.getLogger(__name__)


class PlateauRule:
    """Decides from the masks of held-out views and the training loss whether a training has reached a plateau.

    Both are seen once per period, and compared between two windows of ``window`` periods, the last and the one before:

    - masks: the share of patches whose label differs, where a patch's label in a window is its most frequent one;
    - loss: the relative decrease of the mean.

    Masks never become constant, because of the Gumbel noise and the batch statistics of the decoder's norm, and they
    jitter more on some data sets than on others. The share of patches that differ is therefore compared with the
    jitter, the mean share of patches whose label differs from one period to the next in the last window. A plateau is
    reached when neither the excess over the jitter nor the decrease of the loss exceeds its limit for ``patience``
    periods in a row.
    """

    def __init__(self, *, window: int, patience: int, mask_change: float, loss_change: float) -> None:
        """
        Args:
            window: periods per window, at least 2.
            patience: periods in a row.
            mask_change: largest share of patches beyond the jitter, in [0, 1].
            loss_change: largest relative decrease of the loss.
        """
        self.window = window
        self.patience = patience
        self.mask_change = mask_change
        self.loss_change = loss_change
        self.labels: list[Tensor] = []
        self.losses: list[float] = []
        self.calm = 0

    def observe(self, labels: Tensor, loss: float) -> dict[str, float]:
        """Add a period.

        Args:
            labels: labels of the held-out views' patches ``(n,)``.
            loss: mean loss of the period.

        Returns:
            the changes of ``masks`` and ``loss``, and the ``jitter``; empty while there are fewer than two windows.
        """
        self.labels = [*self.labels, labels][-2 * self.window :]
        self.losses = [*self.losses, loss][-2 * self.window :]
        if len(self.labels) < 2 * self.window:
            return {}
        before, last = (torch.stack(x).mode(0).values for x in (self.labels[: self.window], self.labels[self.window :]))
        earlier, recent = (sum(x) / self.window for x in (self.losses[: self.window], self.losses[self.window :]))
        steps = zip(self.labels[self.window :], self.labels[self.window + 1 :], strict=False)
        jitter = sum(_difference(first, second) for first, second in steps) / (self.window - 1)
        changes = {
            "masks": _difference(before, last),
            "jitter": jitter,
            "loss": (earlier - recent) / max(abs(earlier), 1e-12),
        }
        calm = changes["masks"] - jitter <= self.mask_change and changes["loss"] <= self.loss_change
        self.calm = self.calm + 1 if calm else 0
        return changes

    @property
    def reached(self) -> bool:
        """Whether a plateau is reached."""
        return self.calm >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"labels": self.labels, "losses": self.losses, "calm": self.calm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.labels, self.losses, self.calm = list(state["labels"]), list(state["losses"]), int(state["calm"])


def _difference(first: Tensor, second: Tensor) -> float:
    """Share of entries that differ."""
    return (first != second).float().mean().item()


class StopAtPlateau(HookBase):
    """Ends a training that has reached a plateau, after a cool-down of the learning rate.

    The main process decides for all. In the cool-down of K iterations the learning rate of the schedule is multiplied
    by ``(1 - k / K) ** power`` in iteration k, as the poly schedule does over a whole run, so the final weights are at
    the end of a decay. Its state is in the checkpoint: a resumed run stops at the same iteration.
    """

    def __init__(self, rule: PlateauRule, views: HeldOutViews, *, period: int, cool_down: int, power: float) -> None:
        """
        Args:
            period: iterations between two looks at the masks.
            cool_down: K, iterations.
            power: exponent of the decay.
        """
        self.rule = rule
        self.views = views
        self.period = period
        self.cool_down = cool_down
        self.power = power
        self._loss_sum = 0.0
        self._start = -1  # iteration in which the cool-down starts
        self._end = -1

    def before_step(self) -> None:
        if self._start < 0:
            return
        factor = (1 - (self.trainer.iter - self._start) / (self._end - self._start)) ** self.power
        for group in self.trainer.optimizer.param_groups:  # the scheduler sets all rates after each iteration
            group["lr"] *= factor

    def after_step(self) -> None:
        trainer, done = self.trainer, self.trainer.iter + 1
        if self._start >= 0:
            return
        main = comm.is_main_process()
        if main:  # others have no losses
            self._loss_sum += float(trainer.storage.history("total_loss").latest())
        if done % self.period:
            return
        changes: dict[str, float] = {}
        if main:
            model = trainer.checkpointer.model
            changes = self.rule.observe(self.views.labels(model), self._loss_sum / self.period)
            trainer.storage.put_scalars(
                **{f"plateau/{name}": value for name, value in changes.items()}, smoothing_hint=False
            )
        self._loss_sum = 0.0
        if comm.all_gather(main and self.rule.reached)[0] and done + self.cool_down < trainer.max_iter:
            self._stop(done, changes)

    def _stop(self, iteration: int, changes: dict[str, float]) -> None:
        self._start, self._end = iteration, iteration + self.cool_down
        if changes:
            trainer = self.trainer
            trainer.storage.put_scalar("plateau/iterations", self._end, smoothing_hint=False)
            logger.info(
                "plateau after %d of %d iterations: in %d held-out views, %.1f %% of the patches have another label"
                " than %d iterations before, and %.1f %% from one look to the next; the loss has changed by %+.1f %%;"
                " the training ends after %d iterations of a decaying learning rate",
                iteration, trainer.max_iter, len(self.views.samples), 100 * changes["masks"],
                self.rule.window * self.period, 100 * changes["jitter"], -100 * changes["loss"], self.cool_down,
            )  # fmt: skip
        self.trainer.end_after(self._end)

    def state_dict(self) -> dict[str, Any]:
        return {**self.rule.state_dict(), "loss_sum": self._loss_sum, "start": self._start, "end": self._end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)
        self._loss_sum = float(state["loss_sum"])
        self._start, self._end = int(state["start"]), int(state["end"])
        if self._start >= 0:
            self.trainer.end_after(self._end)
