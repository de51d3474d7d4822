"""Compare the outputs of an exported file and the model.

Shape letters: C classes, (H, W) size of the image in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.export.module import map_grids
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.postprocessing import upsample_logits


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of an exported file with the model, on one image.

    Attributes:
        size: (H, W).
        difference: largest difference of logits. For a file that outputs labels: the largest amount by which the
            model's logit of a label is below the model's maximum at that pixel.
        span: the model's largest logit minus its smallest, the scale of the difference.
        equal: fraction of pixels with the model's label.
        of_labels: whether the file outputs labels.
    """

    size: tuple[int, int]
    difference: float
    span: float
    equal: float
    of_labels: bool = False

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most ``tolerance`` times the span; False for NaN."""
        return self.difference <= tolerance * self.span

    def __str__(self) -> str:
        what = "logit below the largest" if self.of_labels else "largest difference"
        return (
            f"{self.size[0]} x {self.size[1]}: {what} {self.difference:.2g} of logits that span {self.span:.3g},"
            f" labels equal {100 * self.equal:.3f} %"
        )


def check_sizes(model: LanguageSegmentor) -> list[tuple[int, int]]:
    """Two sizes (H, W) for checking a graph for any size: one at which the model resizes none of its maps, and an odd
    one. Neither is the size of the trace."""
    height, width = (map_grids(model) or [(8, 9)])[0]
    step = model.size_divisibility
    return [(height * step, width * step), (height * step * 3 // 4 - 1, width * step * 5 // 4 + 3)]


def check_image(seed: int, size: tuple[int, int]) -> Tensor:
    """An image ``(3, H, W)`` uint8 of soft colour patches with some noise, in place of a photograph."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, -(-size[0] // 24) + 1, -(-size[1] // 24) + 1, generator=generator)
    pixels = 255 * F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)[0]
    return (pixels + 12 * torch.randn(pixels.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reference_logits(model: LanguageSegmentor, image: Tensor) -> Tensor:
    """The model's logits ``(C, H, W)`` of an image ``(3, H, W)``, at its size, without the compiled kernels.

    Padding is part of the image, as in :class:`~reclip_d2.export.module.ExportModule`.
    """
    batch = model.preprocess_image([{"image": image}])
    padded_size, size = tuple(batch.tensor.shape[-2:]), tuple(image.shape[-2:])
    with use_kernels(False):
        return upsample_logits(model.mask_logits(batch.tensor), padded_size, size, size)[0]


def agreement(reference: Tensor, output: Tensor, label_ids: Sequence[int] | None = None) -> Agreement:
    """Compare a file's output with the model's.

    Args:
        reference: the model's logits ``(C, H, W)``.
        output: the file's logits ``(C, H, W)`` or, if they are integers, labels ``(H, W)``.
        label_ids: label id of each class; by default 0 to C - 1.
    """
    size = (reference.shape[-2], reference.shape[-1])
    span = (reference.max() - reference.min()).item()
    of_labels = not output.is_floating_point()
    if tuple(output.shape) != (size if of_labels else tuple(reference.shape)):  # a subtraction might broadcast
        return Agreement(size, float("nan"), span, 0.0, of_labels)
    if not of_labels:
        equal = output.argmax(0) == reference.argmax(0)
        return Agreement(size, (output - reference).abs().max().item(), span, equal.float().mean().item())
    ids = torch.arange(len(reference)) if label_ids is None else torch.tensor(list(label_ids))
    logit = torch.full(size, float("-inf"), dtype=reference.dtype)  # of the file's label; -inf for an unknown label
    for label in ids.unique().tolist():  # classes may share an id
        logit = torch.where(output.long() == label, reference[ids == label].amax(0), logit)
    equal = output.long() == ids[reference.argmax(0)]
    difference = (reference.amax(0) - logit).max().item()
    return Agreement(size, difference, span, equal.float().mean().item(), of_labels)
