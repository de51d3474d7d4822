"""Inference that all models of this project share: normalisation, padding, sliding windows, resizing.

Shape letters: B images, C classes, (h, w) grid of the features, (H, W) size in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor, nn

from reclip_d2.layers import use_kernels
from reclip_d2.modeling.postprocessing import sliding_window_logits, upsample_labels, upsample_logits


class LanguageSegmentor(nn.Module):
    """Base of the models that give each pixel a class of a list of names.

    Subclasses define :meth:`mask_logits`, :attr:`size_divisibility` and :meth:`identity`.
    """

    def __init__(
        self,
        class_names: list[list[str]],
        *,
        templates: str,
        pixel_mean: list[float],
        pixel_std: list[float],
        sliding_window: tuple[tuple[int, int], tuple[int, int]] | None = None,
        label_maps: bool = True,
        kernels: bool = True,
    ) -> None:
        """
        Args:
            class_names: for each class its name and any synonyms.
            templates: name of the template set, for the identity.
            pixel_mean, pixel_std: RGB, in [0, 255].
            sliding_window: (window, stride), each (height, width) in pixels; None predicts the whole image.
            label_maps: give ``"sem_seg"`` as a label map instead of logits (see :meth:`forward`).
            kernels: use the compiled kernels if they are built.
        """
        super().__init__()
        self.class_names = class_names
        self.templates = templates
        self.sliding_window = sliding_window
        self.label_maps = label_maps
        self.kernels = kernels
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def size_divisibility(self) -> int:
        """The sides of the network's input are multiples of this."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this model belongs to, besides its weights: plain values, for JSON."""
        raise NotImplementedError

    def former_identity(self) -> dict[str, Any]:
        """The part of :meth:`identity` that checkpoints of earlier versions do not record: the values that these took
        from the config."""
        return {}

    def normalize(self, image: Tensor) -> Tensor:
        """The network's view of an image ``(3, H, W)``, RGB in [0, 255]."""
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std

    def preprocess_image(self, batched_inputs: list[dict[str, Any]], divisibility: int = 0) -> ImageList:
        """Normalise the images and pad them to a common multiple of ``divisibility`` (0: the model's own)."""
        images = [self.normalize(x["image"]) for x in batched_inputs]
        return ImageList.from_tensors(images, divisibility or self.size_divisibility)

    def mask_logits(self, images: Tensor) -> Tensor:
        """Mask logits M_o ``(B, C, h, w)`` of normalised, padded images ``(B, 3, H, W)``: what the argmax reads."""
        raise NotImplementedError

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Inference, one image at a time, so that a prediction does not depend on its batch.

        Args:
            batched_inputs: dicts with ``image`` ``(3, H, W)``, RGB in [0, 255], and optionally ``height``, ``width``
                of the wanted output.

        Returns:
            for each image ``{"sem_seg": (C, height, width) logits}``, or ``{"sem_seg": (height, width) int64}``
            with ``label_maps``.
        """
        with use_kernels(self.kernels):
            return [{"sem_seg": self.predict(x)} for x in batched_inputs]

    @torch.no_grad()
    def predict(self, record: dict[str, Any]) -> Tensor:
        """Prediction of one image; see :meth:`forward`."""
        image = self.preprocess_image([record])
        size = tuple(image.image_sizes[0])
        output_size = (record.get("height", size[0]), record.get("width", size[1]))
        if self.sliding_window is None:
            logits, padded_size = self.mask_logits(image.tensor), tuple(image.tensor.shape[-2:])
        else:
            pixels = image.tensor[0, :, : size[0], : size[1]]
            logits, padded_size = sliding_window_logits(pixels, self._window_logits, *self.sliding_window)[None], size
        upsample = upsample_labels if self.label_maps else upsample_logits
        return upsample(logits, padded_size, size, output_size)[0]

    def _window_logits(self, window: Tensor) -> Tensor:
        size = (window.shape[-2], window.shape[-1])
        padded = ImageList.from_tensors([window], self.size_divisibility).tensor
        return upsample_logits(self.mask_logits(padded), tuple(padded.shape[-2:]), size, size)[0]


def inference_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of :class:`LanguageSegmentor` that only say how to predict."""
    window = cfg.TEST.SLIDING_WINDOW
    return {
        "templates": cfg.MODEL.CLIP.TEMPLATES,
        "sliding_window": (tuple(window.SIZE), tuple(window.STRIDE)) if window.ENABLED else None,
        "label_maps": cfg.TEST.LABEL_MAPS,
        "kernels": cfg.MODEL.USE_KERNELS,
    }
