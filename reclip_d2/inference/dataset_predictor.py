"""A predictor for Detectron2's ``inference_on_dataset``.

Shape letters: C classes, (H, W) size of the image in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reclip_d2.errors import ReclipError
from reclip_d2.inference.predictor import ImagePredictor
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.distillation import Distillation


class DatasetPredictor(nn.Module):
    """Predictions of an :class:`ImagePredictor` for the records of a test loader.

    The loader maps images by :func:`~reclip_d2.data.dataset_mapper.build_test_mapper`: they are resized already, except
    those that the predictor cuts into tiles.
    """

    def __init__(self, model: nn.Module, predictor: ImagePredictor, label_maps: bool = True) -> None:
        """
        Args:
            model: the predictor's model, or a wrapper around it; put into eval mode for the evaluation.
            predictor: predicts single images.
            label_maps: return label maps instead of logits.
        """
        super().__init__()
        self.model = model
        self.predictor = predictor
        self.label_maps = label_maps
        self.training = model.training  # inference_on_dataset restores this mode at the end

    @classmethod
    def from_config(cls, model: nn.Module, cfg: CfgNode) -> DatasetPredictor:
        """The predictor for a model as the trainer holds it: possibly distributed, or with its teacher."""
        predictor = ImagePredictor.from_config(predicting_model(model), cfg).without_unsupported_classes(cfg)
        return cls(model, predictor, cfg.TEST.LABEL_MAPS)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Predict images, one at a time.

        Args:
            batched_inputs: dicts with ``image`` ``(3, H', W')`` uint8, RGB, and optionally ``height``, ``width``.

        Returns:
            for each image ``{"sem_seg": (height, width) int64}``, or ``{"sem_seg": (C, height, width)}`` logits.
        """
        return [{"sem_seg": self._predict(record)} for record in batched_inputs]

    @torch.no_grad()
    def _predict(self, record: dict[str, Any]) -> Tensor:
        image, predictor = record["image"], self.predictor
        size = (record.get("height", image.shape[-2]), record.get("width", image.shape[-1]))
        if predictor.tiling.applies_to(size):
            if tuple(image.shape[-2:]) != size:
                raise ReclipError(
                    f"image {record.get('file_name', '')} has {image.shape[-2]} x {image.shape[-1]} pixels, but its"
                    f" record says {size[0]} x {size[1]}: correct the data set's list, or raise INPUT.TILES.FROM_SIDE"
                )
            bands = predictor.bands(image.permute(1, 2, 0).numpy(), file=record.get("file_name"))
        else:
            bands = predictor.image_bands(image, size, file=record.get("file_name"))
        result: Tensor | None = None
        for band in bands:
            part = band.labels if self.label_maps else band.logits
            if result is None:
                result = part.new_empty((*part.shape[:-2], *size))
            result[..., band.rows, :] = part
        assert result is not None
        return result


def predicting_model(model: nn.Module) -> LanguageSegmentor:
    """The model that predicts: unwraps a distributed model, and returns the student of a distillation."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.final_student if isinstance(model, Distillation) else model
