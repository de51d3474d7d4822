"""Views of a few images that show whether training still changes the masks; no label is read.

Shape letters: (h, w) grid of a view's mask logits.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.sampling import NumberedDataset
from reclip_d2.features.training import FixedViews, spread
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.distillation import Distillation
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor


class HeldOutViews:
    """Views of training images that are not trained on: the images at test size or, with a store of several views per
    image, its first view of each, see :class:`~reclip_d2.features.training.FixedViews`."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        """
        Args:
            samples: dicts with ``image`` ``(3, H, W)``, RGB in [0, 255], or ``features`` and ``view_size``.
        """
        self.samples = samples

    @classmethod
    def of(cls, cfg: CfgNode, dataset: FixedViews | NumberedDataset, number: int) -> HeldOutViews:
        """Views of up to ``number`` images of a training data set."""
        if isinstance(dataset, FixedViews) and dataset.held_out:
            return cls([dataset.sample(view) for view in sorted(dataset.held_out)])
        records = dataset.views.records if isinstance(dataset, FixedViews) else dataset.records
        mapper = UnlabelledDatasetMapper(cfg, is_train=False)
        return cls([mapper(records[index]) for index in spread(len(records), number)])

    @torch.no_grad()
    def labels(self, model: nn.Module) -> Tensor:
        """Labels of all patches of all views, ``(sum of h*w,)`` int32 on the CPU.

        Features of a frozen CLIP are computed once. The model's mode is restored afterwards.
        """
        segmentor = model.final_student if isinstance(model, Distillation) else model
        training = model.training
        model.eval()
        try:
            with use_kernels(segmentor.kernels):
                logits = [self._logits(segmentor, sample) for sample in self.samples]
        finally:
            model.train(training)
        return torch.cat([one.argmax(1).flatten().to("cpu", torch.int32) for one in logits])

    def _logits(self, model: LanguageSegmentor, sample: dict[str, Any]) -> Tensor:
        frozen = isinstance(model, CLIPSegmentor) and not any(p.requires_grad for p in model.backbone.parameters())
        if not frozen:
            images = model.preprocess_image([sample])
            return model.mask_logits(images.tensor, images.image_sizes)
        if "features" not in sample:
            features, size = model.view_encoder(sample["image"])
            sample["features"], sample["view_size"] = features.to(torch.float16), size
        return model.segment_views(model.view_batch([sample]))
