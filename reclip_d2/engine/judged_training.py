"""Keep the model of the training that the judge without labels scores highest (not in the papers)."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils.data import Dataset

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_free import Reference, judge_score, reference_from_store
from reclip_d2.features.store import FeatureStore
from reclip_d2.features.training import FixedViews, feature_source
from reclip_d2.modeling.meta_arch.distillation import Distillation

logger = logging.getLogger(__name__)


class KeepBestJudged(HookBase):
    """Scores the model every ``period`` iterations and at the end, and restores the best one after the last iteration,
    before the final checkpoint is written.

    The score is :func:`~reclip_d2.evaluation.label_free.judge_score` on the training images, and opens no label. The
    main process decides for all. The best weights so far are in the checkpoints, so a resumed run keeps the same model.
    """

    def __init__(self, store: FeatureStore, reference: Reference | None, period: int) -> None:
        """
        Args:
            store: of views whose first is the whole image.
            reference: of images of the store; None on other processes than the main one.
            period: iterations between two scores.
        """
        self.store = store
        self.reference = reference
        self.period = period
        self._best = float("-inf")
        self._iteration = 0
        self._weights: dict[str, Tensor] = {}

    @classmethod
    def of(cls, cfg: CfgNode, model: nn.Module, dataset: Dataset) -> KeepBestJudged:
        """The hook of ``SOLVER.JUDGE_PERIOD``. Called by all processes.

        Args:
            dataset: the training's.

        Raises:
            ReclipError: the training does not read a feature store.
        """
        if not isinstance(dataset, FixedViews) or dataset.store is None:
            raise ReclipError(
                "SOLVER.JUDGE_PERIOD needs the feature store, which is not made: set FEATURE_STORE.MAX_SIZE and FOLDER"
                " so that it fits, or SOLVER.JUDGE_PERIOD 0"
            )
        source, reference = feature_source(model), None
        if comm.is_main_process():
            reference = reference_from_store(dataset.store, source.query_features, source.backbone.logit_scale)
        return cls(dataset.store, reference, cfg.SOLVER.JUDGE_PERIOD)

    def after_step(self) -> None:
        trainer, done = self.trainer, self.trainer.iter + 1
        last = done == trainer.max_iter
        if done % self.period and not last:
            return
        model, score = trainer.checkpointer.model, float("-inf")
        if self.reference is not None:
            segmentor = model.final_student if isinstance(model, Distillation) else model
            score = judge_score(segmentor, self.store, self.reference)
            trainer.storage.put_scalar("judge/estimated_miou", score, smoothing_hint=False)
        score = comm.all_gather(score)[0]
        if score > self._best:
            self._best, self._iteration = score, done
            self._weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        if last:
            self._restore(model, done, score)

    def _restore(self, model: nn.Module, last: int, score: float) -> None:
        """Load the best weights. They stay in the state, for a training that is resumed with more iterations."""
        if self._weights and self._iteration != last:
            model.load_state_dict(self._weights)
            logger.info(
                "judged without labels, the model of iteration %d is the best: its estimated mIoU is %.1f, that of the"
                " last iteration %.1f; it is kept",
                self._iteration, self._best, score,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "iteration": self._iteration, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._iteration = float(state["best"]), int(state["iteration"])
        self._weights = dict(state["weights"])
