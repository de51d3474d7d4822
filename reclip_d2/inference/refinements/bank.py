"""Refinement by a bank of features from unlabelled images.

Shape letters: C classes, D width of the joint embedding, (h, w) patch grid, M_c entries of a class.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.inference.bank_file import Bank
from reclip_d2.inference.refinements.base import REFINEMENTS, Grid
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor


def nearest_similarity(features: Tensor, entries: Tensor, neighbours: int) -> Tensor:
    """Mean cosine of each feature with its nearest entries.

    Args:
        features: ``(n, D)``, rows of length 1.
        entries: ``(M_c, D)``, at least one, rows of length 1.
        neighbours: number of nearest entries, at most M_c.

    Returns:
        ``(n,)``.
    """
    return (features @ entries.T).topk(min(neighbours, len(entries)), dim=1).values.mean(1)


def mix_with_bank(log_probabilities: Tensor, similarity: Tensor, known: Tensor, weight: float, scale: float) -> Tensor:
    """``L_c = (1 - λ) log p_c + λ log q_c``, with q the soft-max of ``β s_c`` over the classes in the bank, times the
    probability that these have in p. Classes without entries keep log p_c.

    Args:
        log_probabilities: log p ``(C, n)``.
        similarity: s ``(C, n)``.
        known: classes with entries ``(C,)`` bool.
        weight: λ.
        scale: β.
    """
    if not known.any():
        return log_probabilities
    inside = log_probabilities[known]
    bank = (scale * similarity[known]).log_softmax(0) + inside.logsumexp(0)
    mixed = log_probabilities.clone()
    mixed[known] = (1 - weight) * inside + weight * bank
    return mixed


@REFINEMENTS.register()
class BankRefinement:
    """Mixes the patches' probabilities with their similarity to the bank's regions of each class."""

    name = "bank"
    needs_features = True
    needs_pixels = False

    def __init__(self, cfg: CfgNode) -> None:
        if not cfg.TEST.BANK.FILE:
            raise ReclipError(
                "TEST.REFINE bank needs TEST.BANK.FILE: make it with tools/build_bank.py, or use reclip segment --bank"
            )
        self.file = Path(cfg.TEST.BANK.FILE)
        self.neighbours = cfg.TEST.BANK.NEIGHBOURS
        self.weight = cfg.TEST.BANK.WEIGHT
        self.scale = cfg.TEST.BANK.SCALE
        self._model: LanguageSegmentor | None = None
        self._bank: Bank | None = None

    def bind(self, model: LanguageSegmentor) -> None:
        """Set the model whose features are refined; the file is read when it is first used."""
        self._model, self._bank = model, None

    def __call__(self, grid: Grid) -> Grid:
        assert grid.features is not None and self._model is not None
        if self._bank is None:
            self._bank = Bank.read(self.file, self._model)
        bank, features = self._bank, grid.features
        cells = (features.shape[-2], features.shape[-1])
        logits = grid.logits
        if tuple(logits.shape[-2:]) != cells:
            logits = F.interpolate(logits[None], cells, mode="bilinear", align_corners=False)[0]
        ids = range(self._model.num_classes) if grid.class_ids is None else grid.class_ids
        mean = bank.mean.to(features.device)
        rows = F.normalize(F.normalize(features.flatten(1).T.float(), dim=1) - mean, dim=1)
        similarity = logits.new_zeros(len(ids), len(rows))
        for row, index in enumerate(ids):  # one class at a time: memory does not grow with their number
            if bank.counts[index]:
                entries = bank.of_class(index).to(features.device).float()
                similarity[row] = nearest_similarity(rows, entries, self.neighbours)
        known = (bank.counts[torch.tensor(list(ids))] > 0).to(logits.device)
        mixed = mix_with_bank(logits.flatten(1).log_softmax(0), similarity, known, self.weight, self.scale)
        return grid.with_logits(mixed.view_as(logits))
