"""What refinements have in common.

Shape letters: C classes, D width of the features, (h, w) grid of the logits, (H, W) size of the network's input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor

from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor

VIEW_REFINEMENTS = ("flip", "scales")
"""Names in ``TEST.REFINE`` that predict several views of an image and average their probabilities
(:class:`~reclip_d2.inference.views.PredictedViews`)."""
_FLOOR = 1e-12
DECODER_SCALE = 10.0
"""Scale of a mask decoder's logits before a soft-max, as in the public code of ReCLIP++."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The logits of one forward pass, and what they were computed from.

    Attributes:
        logits: ``(C, h, w)``, such that their soft-max over C gives probabilities.
        pixels: ``(3, H, W)``: the normalised image or window, without padding.
        padded_size: (height, width) of the network's input that the grid covers.
        features: ``(D, h', w')`` on the patch grid, if :attr:`Refinement.needs_features`.
        padding_counts: whether padding is part of the image (``TEST.PADDING stretch``).
        class_ids: the model's class of each of the C, if they are a subset; None for all.
        again: the grid of another forward pass, with feedback to the dense attention; without refinements.
    """

    logits: Tensor
    pixels: Tensor
    padded_size: tuple[int, int]
    features: Tensor | None = None
    padding_counts: bool = False
    class_ids: Sequence[int] | None = None
    again: Callable[[Feedback], Grid] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) without padding."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def valid(self) -> tuple[int, int]:
        """(rows, columns) of the grid whose cells contain a pixel of the image."""
        cells = self.logits.shape[-2:]
        if self.padding_counts:
            return cells[0], cells[1]
        rows, columns = (
            -(-side * count // padded) for side, count, padded in zip(self.size, cells, self.padded_size, strict=True)
        )
        return rows, columns

    def with_logits(self, logits: Tensor) -> Grid:
        """The same grid with other logits."""
        return dataclasses.replace(self, logits=logits)

    def at_pixels(self, probabilities: Tensor) -> Grid:
        """A grid with one cell per pixel, from probabilities ``(C, H, W)``, which it overwrites."""
        return dataclasses.replace(self, logits=probabilities.clamp_(min=_FLOOR).log_(), padded_size=self.size)


def pixel_probabilities(grid: Grid, chunk: int = 8) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities at the pixels, a few classes at a time, so that memory does not grow with their number.

    Yields:
        the classes, and their probabilities ``(chunk, H, W)`` float32.
    """
    height, width = grid.size
    covered = grid.size if grid.padding_counts else grid.padded_size
    low = grid.logits.log_softmax(0)
    for start in range(0, len(low), chunk):
        part = F.interpolate(low[None, start : start + chunk], covered, mode="bilinear", align_corners=False)
        yield slice(start, start + chunk), part[0, :, :height, :width].exp()


class Refinement(Protocol):
    """Changes the logits of one forward pass. Built from a config: ``Refinement(cfg)``. One that depends on the model
    has a method ``bind(model)``, which is called before it is used."""

    name: str
    """In ``TEST.REFINE``."""
    needs_features: bool
    """Whether :attr:`Grid.features` must be there."""
    needs_pixels: bool
    """Whether :attr:`Grid.pixels` are read; otherwise stored features are enough."""

    def __call__(self, grid: Grid) -> Grid:
        """The grid with refined logits, possibly finer: up to one cell per pixel."""
        ...


class RefinementRegistry(Registry):
    """Registers refinements under their ``name``: ``@REFINEMENTS.register()``."""

    def register(self, obj: Any = None) -> Any:  # noqa: ANN401
        """Register a class, as decorator or call."""

        def add(refinement: type[Refinement]) -> type[Refinement]:
            self._do_register(refinement.name, refinement)
            return refinement

        return add if obj is None else add(obj)


REFINEMENTS = RefinementRegistry("REFINEMENTS")
"""Classes of :class:`Refinement`, by the name in ``TEST.REFINE``."""


def known_refinements() -> list[str]:
    """All names for ``TEST.REFINE``."""
    return sorted([*VIEW_REFINEMENTS, *(name for name, _ in REFINEMENTS)])


def build_refinements(cfg: CfgNode, model: LanguageSegmentor | None = None) -> list[Refinement]:
    """The refinements of single forward passes in ``TEST.REFINE``, in order.

    Args:
        model: whose logits they refine; None to check the config only.

    Raises:
        ReclipError: there is no such refinement, or one is named twice.
    """
    names, known = list(cfg.TEST.REFINE), known_refinements()
    for name in names:
        if name not in known:
            raise ReclipError(f"TEST.REFINE has {name!r}, which is not known: choose from {', '.join(known)}")
        if names.count(name) > 1:
            raise ReclipError(f"TEST.REFINE has {name!r} twice: remove one")
    elsewhere = list(VIEW_REFINEMENTS)
    if cfg.TEST.REGION_VOTE.REGIONS == "masks":  # the whole image's: see reclip_d2.inference.region_masks
        elsewhere.append("region_vote")
    refinements = [REFINEMENTS.get(name)(cfg) for name in names if name not in elsewhere]
    for refinement in refinements:
        if model is not None and hasattr(refinement, "bind"):
            refinement.bind(model)
    return refinements


def softmax_scale(model: LanguageSegmentor) -> float:
    """Factor of a model's mask logits before their soft-max: CLIP's logit scale for cosines,
    :data:`DECODER_SCALE` behind a mask decoder, 1 for a student, whose logits include it."""
    if not isinstance(model, CLIPSegmentor):
        return 1.0
    return model.backbone.logit_scale if getattr(model, "mask_decoder", None) is None else DECODER_SCALE
