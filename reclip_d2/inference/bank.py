"""Makes a bank (:mod:`reclip_d2.inference.bank_file`) from unlabelled images: a user's own folder, or a data set's.

Shape letters: C classes, D width of the joint embedding, (h, w) patch grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.features.views import ViewPlan, Views
from reclip_d2.features.whole_images import WholeImages
from reclip_d2.inference.bank_file import Bank, bank_identity
from reclip_d2.inference.predictor import ImagePredictor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.view_batch import batch_views
from reclip_d2.utils.progress import count_steps

CONFIDENT = 0.25
"""Share of a region's patches, the most confident ones, whose features make its entry."""


class BankBuilder:
    """Collects regions; keeps the ``size`` most confident of each class, so that memory does not grow with images."""

    def __init__(self, num_classes: int, embed_dim: int, size: int) -> None:
        """
        Args:
            size: most entries of a class, ``TEST.BANK.SIZE``.
        """
        self.size = size
        self._sum = torch.zeros(embed_dim, dtype=torch.float64)
        self._patches = 0
        self._regions: list[list[tuple[float, int, Tensor]]] = [[] for _ in range(num_classes)]

    def add(self, features: Tensor, logits: Tensor) -> None:
        """Add an image: for each class that it predicts, one entry, the mean feature of the quarter of the class's
        patches with the highest probability (at least one).

        Args:
            features: Z ``(h, w, D)``.
            logits: ``(C, h, w)``, such that their soft-max gives probabilities.
        """
        rows = F.normalize(features.flatten(0, 1).float(), dim=1)
        self._sum += rows.double().sum(0)
        confidence, labels = logits.softmax(0).flatten(1).max(0)
        for index in labels.unique().tolist():
            members = (labels == index).nonzero()[:, 0]
            best = confidence[members].topk(max(1, round(CONFIDENT * len(members)))).indices
            chosen = members[best]
            entry = rows[chosen].mean(0).half()
            self._regions[index].append((float(confidence[chosen].mean()), -self._patches, entry))
            if len(self._regions[index]) >= 2 * self.size:
                self._shrink(index)
        self._patches += len(rows)

    def _shrink(self, index: int) -> None:
        regions = sorted(self._regions[index], key=lambda region: region[:2], reverse=True)
        self._regions[index] = regions[: self.size]

    def finish(self, identity: dict[str, Any]) -> Bank:
        """The bank.

        Raises:
            ReclipError: there was no image.
        """
        if not self._patches:
            raise ReclipError("a bank needs images: none could be read")
        for index in range(len(self._regions)):
            self._shrink(index)
        mean = (self._sum / self._patches).float()
        entries = [entry for regions in self._regions for _, _, entry in regions]
        centred = F.normalize(torch.stack(entries).float() - mean, dim=1).half()
        return Bank(mean, centred, torch.tensor([len(regions) for regions in self._regions]), identity)


@torch.no_grad()
def build_bank(cfg: CfgNode, predictor: ImagePredictor, records: Iterable[dict[str, Any]]) -> Bank:
    """The bank of a model's predictions on images, from whole images at the test resolution. Reads no labels.

    Args:
        predictor: of a model with a CLIP; its refinements are not used.
        records: unlabelled, with ``file_name`` and ``image_id``.

    Raises:
        ReclipError: the model has no CLIP, or no image can be read.
        AssertionError: a record has a label.
    """
    model = predictor.model
    identity = bank_identity(model)
    assert isinstance(model, CLIPSegmentor)
    records, stride = list(records), model.backbone.stride
    images = WholeImages(Views(cfg, records, ViewPlan.whole_images(cfg)), stride, model.view_encoder)
    builder = BankBuilder(model.num_classes, model.backbone.embed_dim, cfg.TEST.BANK.SIZE)
    with count_steps("bank", len(records), unit="image") as steps:
        for number in range(len(records)):
            try:
                features = images[number]
            except ReclipError:  # reported when its mask is predicted
                steps.advance()
                continue
            size = (features.shape[0] * stride, features.shape[1] * stride)
            batch = batch_views([features], [size], model.device, model.padding_mode)
            logits = model.segment_views(batch)[0].float() * predictor.scale
            builder.add(features.cpu(), logits.cpu())
            steps.advance()
    return builder.finish(identity)
