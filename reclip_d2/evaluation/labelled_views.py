"""Samples of a linear probe from a feature store: fixed views with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from torch import nn
from torch.utils.data import Dataset

from reclip_d2.data.dataset_mapper import LABEL_KEYS
from reclip_d2.data.sampling import numbered_random_state
from reclip_d2.evaluation.labelled_data import LabelledDatasetMapper
from reclip_d2.features.training import FixedViews, fixed_views
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor


class LabelledViews(Dataset):
    """Samples by ``(draw, index)``: those of :class:`~reclip_d2.features.training.FixedViews`, with ``sem_seg``
    ``(H, W)`` int64 of the view.

    A label is augmented as the view's pixels were: with the same augmentations and the same random state.
    """

    def __init__(
        self, fixed: FixedViews, records: Sequence[dict[str, Any]], mappers: Sequence[LabelledDatasetMapper]
    ) -> None:
        """
        Args:
            fixed: views of the records :func:`without_labels`.
            records: with labels.
            mappers: with the augmentations of each view, ``fixed.views.augmentations``.
        """
        self.fixed = fixed
        self.records = records
        self.mappers = mappers

    def __len__(self) -> int:
        return len(self.fixed)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        draw, index = key
        views = self.fixed.views
        number = views.number(index, draw)
        view = number % views.plan.number
        with numbered_random_state(views.plan.seed, index, view):
            label = self.mappers[view](self.records[index])["sem_seg"]
        return {**self.fixed.sample(number), "sem_seg": label}


def without_labels(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the records as the training without labels has them: no label entries, an ``image_id`` in each."""
    stripped = [{key: value for key, value in record.items() if key not in LABEL_KEYS} for record in records]
    return [{"image_id": record["file_name"], **record} for record in stripped]


def labelled_views(
    cfg: CfgNode, model: nn.Module, records: Sequence[dict[str, Any]], **mapper: Any
) -> LabelledViews | None:
    """Training data of a probe for ``FEATURE_STORE.VIEWS`` above 0; computes the store if it is missing. Called by all
    processes.

    The store is that of the training without labels, if that has the same images.

    Args:
        model: the probed model.
        records: with labels.
        mapper: arguments of :class:`LabelledDatasetMapper` but the augmentations.

    Returns:
        None if the probe cannot read stored features: there are no fixed views, or the model has no frozen CLIP.
    """
    if not cfg.FEATURE_STORE.VIEWS or not isinstance(model, CLIPSegmentor) or cfg.MODEL.CLIP.FINE_TUNE:
        return None
    fixed = fixed_views(cfg, model, without_labels(records))
    mappers = [LabelledDatasetMapper(augmentations=views, **mapper) for views in fixed.views.augmentations]
    return LabelledViews(fixed, records, mappers)
