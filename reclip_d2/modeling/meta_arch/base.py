"""Inference shared by all models: normalisation, padding, resizing of logits.

Shape letters: B images, C classes, (h, w) grid of the features, (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor, nn

from reclip_d2.layers import use_kernels
from reclip_d2.modeling.postprocessing import upsample_logits
from reclip_d2.modeling.view_batch import stack_on

ImageSizes = Sequence[tuple[int, int]]
"""(H, W) of each image of a batch, without padding."""


class LanguageSegmentor(nn.Module):
    """Base of models that assign each pixel a class from a list of names.

    Subclasses define :meth:`mask_logits`, :attr:`size_divisibility` and :meth:`identity`.
    """

    def __init__(
        self,
        class_names: list[list[str]],
        *,
        templates: str,
        pixel_mean: list[float],
        pixel_std: list[float],
        kernels: bool = True,
    ) -> None:
        """
        Args:
            class_names: for each class its name and any synonyms.
            templates: name of the template set, for the identity.
            pixel_mean, pixel_std: for normalising images: RGB, in [0, 255].
            kernels: use the compiled kernels if they are built.
        """
        super().__init__()
        self.class_names = class_names
        self.templates = templates
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
        """The sides of the network's input must be multiples of this."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """All that a checkpoint depends on besides its weights, as JSON values."""
        raise NotImplementedError

    def former_identity(self) -> dict[str, Any]:
        """Fields of :meth:`identity` that checkpoints of earlier versions do not record, with the values that those
        versions took from the config."""
        return {}

    def normalize(self, image: Tensor) -> Tensor:
        """Normalise an image ``(3, H, W)``, or a batch of one size, RGB in [0, 255], for the network."""
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std

    def preprocess_image(self, batched_inputs: list[dict[str, Any]], divisibility: int = 0) -> ImageList:
        """Normalise the images and pad them to a common multiple of ``divisibility`` (0: the model's own)."""
        images = [x["image"] for x in batched_inputs]
        divisibility = divisibility or self.size_divisibility
        if not (_is_gpu(self.device) and len({(image.shape, image.dtype, image.device) for image in images}) == 1):
            return ImageList.from_tensors([self.normalize(image) for image in images], divisibility)
        pixels = self.normalize(stack_on(self.device, images))  # one copy of bytes for the batch
        if any(side % divisibility for side in pixels.shape[-2:]):
            return ImageList.from_tensors(list(pixels), divisibility)
        return ImageList(pixels, [(image.shape[-2], image.shape[-1]) for image in images])

    def mask_logits(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        """Mask logits M_o ``(B, C, h, w)`` of normalised, padded images ``(B, 3, H, W)``; labels are their argmax.

        Args:
            image_sizes: (H, W) of each image without padding; None to treat padding as part of the image.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Logits of whole images in Detectron2's format; one image at a time, so that predictions do not depend on the
        batch. For labels, windows and bounded memory use :class:`~reclip_d2.inference.ImagePredictor`.

        Args:
            batched_inputs: dicts with ``image`` ``(3, H, W)``, RGB in [0, 255], and optionally ``height`` and ``width``
                of the output.

        Returns:
            for each image ``{"sem_seg": (C, height, width) logits}``.
        """
        with use_kernels(self.kernels):
            return [{"sem_seg": self._image_logits(x)} for x in batched_inputs]

    def _image_logits(self, record: dict[str, Any]) -> Tensor:
        image = self.preprocess_image([record])
        padded_size, size = tuple(image.tensor.shape[-2:]), tuple(image.image_sizes[0])
        output_size = (record.get("height", size[0]), record.get("width", size[1]))
        return upsample_logits(self.mask_logits(image.tensor, image.image_sizes), padded_size, size, output_size)[0]


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def inference_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of :class:`LanguageSegmentor` that do not depend on the kind of model."""
    return {"templates": cfg.MODEL.CLIP.TEMPLATES, "kernels": cfg.MODEL.USE_KERNELS}
